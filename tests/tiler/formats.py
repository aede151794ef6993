"""Makers of tiny slides, one for each format that is read: two levels of one picture, opened by the real readers.

What a file must hold for OpenSlide to take it for a vendor's is told at https://openslide.org/formats/. No maker
claims to write what the scanner writes: only what is looked at.
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import tifffile
import zarr
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items
from pydicom.uid import JPEGBaseline8Bit, generate_uid

Picture = NDArray[np.uint8]

WIDTH, HEIGHT, TILE = 512, 384, 128
"""Level 0 and its tiles, px; level 1 is half as large."""
MPP = 0.25
_PER_CM = (10_000 / MPP, 10_000 / MPP)


def draw_picture() -> Picture:
    """A picture that no two places have in common, smooth enough for JPEG, (HEIGHT, WIDTH, 3)."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    red, green = x * 200 // WIDTH + 30, y * 200 // HEIGHT + 30
    blue = 128 + 60 * np.sin(x / 17) * np.cos(y / 23)
    return np.stack([red, green, blue], axis=2).astype(np.uint8)


def halve(picture: Picture) -> Picture:
    """Each px the mean of four."""
    return np.asarray(cv2.resize(picture, (picture.shape[1] // 2, picture.shape[0] // 2), interpolation=cv2.INTER_AREA))


def encode_jpeg(rgb: Picture, *, restart: int = 0) -> bytes:
    """A JPEG of quality 95 without chroma subsampling; `restart`: MCUs (8 px) between restart markers."""
    flags = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    flags += [cv2.IMWRITE_JPEG_RST_INTERVAL, restart] if restart else []
    return bytes(cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), flags)[1])


def cut(picture: Picture, tile: int = TILE) -> list[Picture]:
    """Its tiles, row by row; those at the edge are filled by repeating it."""
    height, width = picture.shape[:2]
    padded = np.pad(picture, ((0, -height % tile), (0, -width % tile), (0, 0)), mode="edge")
    return [padded[y : y + tile, x : x + tile] for y in range(0, height, tile) for x in range(0, width, tile)]


def write_page(tiff: tifffile.TiffWriter, picture: Picture, **options: Any) -> None:
    """Appends a page of JPEG tiles."""
    tiff.write(
        iter([encode_jpeg(tile) for tile in cut(picture)]),
        shape=picture.shape,
        dtype=np.uint8,
        tile=(TILE, TILE),
        photometric="ycbcr",
        subsampling=(1, 1),
        compression="jpeg",
        **{"metadata": None, "software": False, **options},
    )


def write_generic(path: Path, picture: Picture, **options: Any) -> Path:
    """A tiled pyramid without a vendor; options of `TiffWriter.write` say how it is stored."""
    small = picture[:, ::2, ::2] if options.get("planarconfig") == "separate" else picture[::2, ::2]
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as tiff:
        for level, pixels in enumerate((picture, small)):
            layout = {"tile": (TILE, TILE), "photometric": "rgb", "metadata": None, **options}
            tiff.write(pixels, subfiletype=level, resolution=_PER_CM, resolutionunit="CENTIMETER", **layout)
    return path


def write_aperio(path: Path, picture: Picture) -> Path:
    """Aperio SVS with its thumbnail."""
    head = f"Aperio Image Library v12.0.0 \r\n{WIDTH}x{HEIGHT} [0,0 {WIDTH}x{HEIGHT}] ({TILE}x{TILE}) JPEG/RGB Q=95"
    with tifffile.TiffWriter(path) as tiff:
        write_page(tiff, picture, description=f"{head}|AppMag = 40|MPP = {MPP}")
        tiff.write(halve(halve(picture)), description=head, photometric="rgb", metadata=None, software=False)
        write_page(tiff, halve(picture), description=head)
    return path


def write_philips(path: Path, picture: Picture, *, more: int = 0) -> Path:
    """Philips TIFF; level 1 is filled up to whole tiles, as the scanner does, and by `more` columns of tiles."""
    small = np.pad(halve(picture), ((0, -HEIGHT // 2 % TILE), (0, more * TILE), (0, 0)), constant_values=255)
    levels = "".join(
        '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING" PMSVR="IDoubleArray">'
        f'"{MPP * down / 1000}" "{MPP * down / 1000}"</Attribute></DataObject>'
        for down in (1, 2)
    )
    xml = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES" PMSVR="IDataObjectArray"><Array>'
        '<DataObject ObjectType="DPScannedImage">'
        '<Attribute Name="PIM_DP_IMAGE_TYPE" PMSVR="IString">WSI</Attribute>'
        f'<Attribute Name="DICOM_PIXEL_SPACING" PMSVR="IDoubleArray">"{MPP / 1000}" "{MPP / 1000}"'
        "</Attribute>"
        f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>{levels}</Array></Attribute>'
        "</DataObject></Array></Attribute></DataObject>"
    )
    with tifffile.TiffWriter(path) as tiff:
        write_page(tiff, picture, description=xml, software="Philips DP v1.0", subfiletype=0)
        write_page(tiff, small, description="level=1", software="Philips DP v1.0", subfiletype=1)
    return path


def write_ndpi(path: Path, picture: Picture) -> Path:
    """Hamamatsu NDPI: one JPEG a level, directories with 64-bit links and an upper word for each value."""
    content = bytearray(b"II*\0" + bytes(8))
    link = 4
    for level, pixels in enumerate((picture, halve(picture))):
        jpeg = encode_jpeg(pixels, restart=pixels.shape[1] // 8 // 4)
        start = len(content)
        content += jpeg + bytes(-len(jpeg) % 4)
        ratio = len(content)
        content += struct.pack("<6H", 8, 8, 8, 0, 0, 0) + struct.pack("<2I", round(_PER_CM[0]) >> level, 1)
        tags = [
            (254, 4, 1, 0),
            (256, 4, 1, pixels.shape[1]),
            (257, 4, 1, pixels.shape[0]),
            (258, 3, 3, ratio),
            (259, 3, 1, 7),
            (262, 3, 1, 6),
            (273, 4, 1, start),
            (277, 3, 1, 3),
            (278, 4, 1, pixels.shape[0]),
            (279, 4, 1, len(jpeg)),
            (282, 5, 1, ratio + 12),
            (283, 5, 1, ratio + 12),
            (296, 3, 1, 3),
            (65420, 4, 1, 1),
            (65421, 11, 1, struct.unpack("<I", struct.pack("<f", 40.0 / 2**level))[0]),
            (65424, 9, 1, 0),
        ]
        content[link : link + 8] = struct.pack("<Q", len(content))
        content += struct.pack("<H", len(tags)) + b"".join(struct.pack("<2H2I", *tag) for tag in tags)
        link = len(content)
        content += bytes(8 + 4 * len(tags))
    path.write_bytes(content)
    return path


def write_vms(path: Path, picture: Picture) -> Path:
    """Hamamatsu VMS: an index, two pictures side by side, and the map as level 1."""
    left, right = picture[:, : WIDTH // 2], picture[:, WIDTH // 2 :]
    for name, pixels in (("left", left), ("right", right), ("map", halve(picture))):
        path.with_name(f"{path.stem}_{name}.jpg").write_bytes(encode_jpeg(pixels, restart=pixels.shape[1] // 8 // 4))
    path.write_text(
        "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=2\nNoJpegRows=1\n"
        f"ImageFile={path.stem}_left.jpg\nImageFile(1,0)={path.stem}_right.jpg\nMapFile={path.stem}_map.jpg\n"
        f"PhysicalWidth={round(WIDTH * MPP * 1000)}\nPhysicalHeight={round(HEIGHT * MPP * 1000)}\nSourceLens=40\n"
    )
    return path


def write_vmu(path: Path, picture: Picture) -> Path:
    """Hamamatsu VMU: an index and two uncompressed pictures of 12 bits, each in columns of TILE px."""
    for name, pixels in (("image", picture), ("map", halve(picture))):
        height, width = pixels.shape[:2]
        head = b"GN" + bytes(2) + struct.pack("<3I", width, height, TILE) + bytes(8) + struct.pack("<I", 28)
        columns = [pixels[:, x : x + TILE].astype("<u2") * 16 for x in range(0, width, TILE)]
        path.with_name(f"{path.stem}_{name}.ngr").write_bytes(head + b"".join(part.tobytes() for part in columns))
    path.write_text(
        "[Uncompressed Virtual Microscope Specimen]\nNoLayers=1\nBitsPerPixel=36\nPixelOrder=RGB\n"
        f"ImageFile={path.stem}_image.ngr\nMapFile={path.stem}_map.ngr\nSourceLens=40\n"
        f"PhysicalWidth={round(WIDTH * MPP * 1000)}\nPhysicalHeight={round(HEIGHT * MPP * 1000)}\n"
    )
    return path


def write_mirax(path: Path, picture: Picture) -> Path:
    """3DHISTECH MRXS: a folder with an index of JPEGs; positions and overlaps left out."""
    folder = path.with_suffix("")
    folder.mkdir()
    path.write_bytes(encode_jpeg(halve(halve(picture))))
    across = WIDTH // TILE
    data, pages = bytearray(), []
    for concat, pixels in ((1, picture), (2, halve(picture))):
        page = []
        for place, tile in enumerate(cut(pixels)):
            row, col = divmod(place, across // concat)
            jpeg = encode_jpeg(tile)
            page.append((row * concat * across + col * concat, len(data), len(jpeg), 0))
            data += jpeg
        pages.append(page)
    (folder / "Data0000.dat").write_bytes(data)
    head = b"01.02" + b"0123456789ABCDEF"
    table = len(head) + 8
    index = bytearray(head + struct.pack("<2I", table, 0) + bytes(4 * len(pages)))
    for level, page in enumerate(pages):
        struct.pack_into("<I", index, table + 4 * level, len(index))
        index += struct.pack("<2I", 0, len(index) + 8) + struct.pack("<2I", len(page), 0)
        index += b"".join(struct.pack("<4I", *entry) for entry in page)
    (folder / "Index.dat").write_bytes(index)
    sections = "".join(
        f"[LEVEL_{level}]\nIMAGE_CONCAT_FACTOR={level}\nOVERLAP_X=0\nOVERLAP_Y=0\nIMAGE_FORMAT=JPEG\n"
        f"MICROMETER_PER_PIXEL_X={MPP * 2**level}\nMICROMETER_PER_PIXEL_Y={MPP * 2**level}\n"
        f"IMAGE_FILL_COLOR_BGR=16777215\nDIGITIZER_WIDTH={TILE}\nDIGITIZER_HEIGHT={TILE}\n"
        for level in (0, 1)
    )
    (folder / "Slidedat.ini").write_text(
        "[GENERAL]\nSLIDE_VERSION=01.02\nSLIDE_ID=0123456789ABCDEF\nOBJECTIVE_MAGNIFICATION=40\n"
        f"IMAGENUMBER_X={across}\nIMAGENUMBER_Y={HEIGHT // TILE}\n"
        "[HIERARCHICAL]\nINDEXFILE=Index.dat\nHIER_COUNT=1\nNONHIER_COUNT=0\nHIER_0_NAME=Slide zoom level\n"
        "HIER_0_COUNT=2\nHIER_0_VAL_0_SECTION=LEVEL_0\nHIER_0_VAL_1_SECTION=LEVEL_1\n"
        f"[DATAFILE]\nFILE_COUNT=1\nFILE_0=Data0000.dat\n{sections}"
    )
    return path


def write_leica(path: Path, picture: Picture) -> Path:
    """Leica SCN whose picture fills the whole slide but for a strip at the right."""
    sides = [(pixels.shape[1], pixels.shape[0]) for pixels in (picture, halve(picture))]
    dimensions = "".join(f'<dimension sizeX="{w}" sizeY="{h}" r="{i}" ifd="{i}"/>' for i, (w, h) in enumerate(sides))
    step = round(MPP * 1000)
    xml = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection sizeX="{WIDTH * step}" sizeY="{HEIGHT * step}"><image><pixels sizeX="{WIDTH}" sizeY="{HEIGHT}">'
        f'{dimensions}</pixels><view sizeX="{WIDTH * step}" sizeY="{HEIGHT * step}" offsetX="0" offsetY="0"/>'
        "<scanSettings><objectiveSettings><objective>40</objective></objectiveSettings><illuminationSettings>"
        "<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>"
        "</collection></scn>"
    )
    # Else it would count as the macro photograph, which covers the whole glass.
    xml = xml.replace(f'<collection sizeX="{WIDTH * step}"', f'<collection sizeX="{(WIDTH + 64) * step}"')
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level, pixels in enumerate((picture, halve(picture))):
            scale = (_PER_CM[0] / 2**level, _PER_CM[1] / 2**level)
            text = xml if level == 0 else None
            write_page(tiff, pixels, description=text, resolution=scale, resolutionunit="CENTIMETER")
    return path


def write_ventana(path: Path, picture: Picture) -> Path:
    """Ventana BIF: the label's directory first, one area without overlaps."""
    across, down = WIDTH // TILE, HEIGHT // TILE
    joints = []
    for row in range(down):  # Numbered from the lowest row up, every second row from right to left.
        for col in range(across):
            number = row * across + (col if row % 2 == 0 else across - 1 - col) + 1
            if col + 1 < across:
                joints.append(("RIGHT", number, number + (1 if row % 2 == 0 else -1)))
            if row + 1 < down:
                joints.append(("UP", number, (row + 1) * across + (across - 1 - col if row % 2 == 0 else col) + 1))
    joint_xml = "".join(
        f'<TileJointInfo FlagJoined="1" Confidence="100" Direction="{direction}" Tile1="{first}" Tile2="{second}" '
        'OverlapX="0" OverlapY="0"/>'
        for direction, first, second in joints
    )
    encode = (
        '<EncodeInfo Ver="2"><SlideInfo/><SlideStitchInfo>'
        f'<ImageInfo AOIScanned="1" AOIIndex="0" NumRows="{down}" NumCols="{across}" Width="{TILE}" Height="{TILE}" '
        f'Pos-X="0" Pos-Y="0">{joint_xml}</ImageInfo></SlideStitchInfo>'
        '<AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin></EncodeInfo>'
    ).encode()
    scan = f'<iScan Magnification="40" ScanRes="{MPP}" Z-layers="1" UnitNumber="0"/>'.encode()
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        write_page(tiff, halve(halve(picture)), description="Label_Image", extratags=[_xml_packet(scan)])
        write_page(tiff, picture, description="level=0 mag=40 quality=95", extratags=[_xml_packet(encode)])
        write_page(tiff, halve(picture), description="level=1 mag=20 quality=95")
    return path


def _xml_packet(xml: bytes) -> tuple[int, str, int, bytes, bool]:
    return 700, "B", len(xml), xml, True


def write_trestle(path: Path, picture: Picture) -> Path:
    """Trestle TIFF, whose resolution tags hold microns per px."""
    with tifffile.TiffWriter(path) as tiff:
        for level, pixels in enumerate((picture, halve(picture))):
            text = "Background Color=FFFFFF;Objective Power=40;OverlapsXY= 0 0 0 0" if level == 0 else None
            scale = (MPP * 2**level, MPP * 2**level)
            write_page(tiff, pixels, description=text, software="MedScan 1.0", resolution=scale, resolutionunit="NONE")
    return path


def write_ome_tiff(path: Path, picture: Picture, **options: Any) -> Path:
    """OME-TIFF: level 1 in a sub-directory of level 0."""
    fields = {"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeXUnit": "µm"}
    fields |= {"PhysicalSizeY": MPP, "PhysicalSizeYUnit": "µm", **options.pop("metadata", {})}
    layout = {"tile": (TILE, TILE), "photometric": "rgb", "compression": "deflate", **options}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(picture, subifds=1, metadata=fields, **layout)
        tiff.write(picture[..., ::2, ::2] if fields["axes"] == "CYX" else picture[::2, ::2], subfiletype=1, **layout)
    return path


def write_ome_zarr(
    path: Path,
    picture: Picture,
    *,
    version: str = "0.4",
    axes: str = "tczyx",
    unit: str = "micrometer",
    mpp: float = MPP,
    omero: dict[str, Any] | None = None,
) -> Path:
    """OME-Zarr; `axes` by their initials in any order, those that the picture lacks have one place."""
    group = zarr.create_group(path, zarr_format=2 if version == "0.4" else 3)
    names = [{"name": axis, **({"type": "space", "unit": unit} if axis in "xyz" else {})} for axis in axes]
    datasets = []
    for level, pixels in enumerate((picture, picture[::2, ::2])):
        data = np.expand_dims(pixels, tuple(range(3, 3 + len(axes) - 3)))
        spare = iter(range(3, data.ndim))
        data = data.transpose([{"y": 0, "x": 1, "c": 2}.get(axis, -1) for axis in axes if axis in "yxc"] + list(spare))
        kept = [axis for axis in axes if axis in "yxc"] + [axis for axis in axes if axis not in "yxc"]
        data = data.transpose([kept.index(axis) for axis in axes])
        chunks = tuple({"x": TILE, "y": TILE}.get(axis, data.shape[i]) for i, axis in enumerate(axes))
        group.create_array(str(level), data=data, chunks=chunks)
        scale = [mpp * 2**level if axis in "xy" else 1.0 for axis in axes]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    fields: dict[str, Any] = {"multiscales": [{"axes": names, "datasets": datasets}]}
    if omero is not None:
        fields["omero"] = omero
    if version == "0.4":
        fields["multiscales"][0]["version"] = version
        group.attrs.update(fields)
    else:
        group.attrs["ome"] = {"version": version, **fields}
    return path


def write_dicom(folder: Path, picture: Picture, names: Sequence[str] = ("1.dcm", "2.dcm")) -> Path:
    """A DICOM series: one whole-slide instance a level (tiled full, baseline JPEG). Returns the file of level 0."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    for level, (name, pixels) in enumerate(zip(names, (picture, halve(picture)), strict=True)):
        file = Dataset()
        file.file_meta = FileMetaDataset()
        file.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.6"
        file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = generate_uid()
        for keyword, uid in shared.items():
            setattr(file, keyword, uid)
        kind = ["ORIGINAL", "NONE"] if level == 0 else ["DERIVED", "RESAMPLED"]
        file.ImageType = [kind[0], "PRIMARY", "VOLUME", kind[1]]
        file.Modality, file.InstanceNumber = "SM", level + 1
        file.DimensionOrganizationType = "TILED_FULL"
        file.TotalPixelMatrixColumns, file.TotalPixelMatrixRows = pixels.shape[1], pixels.shape[0]
        file.TotalPixelMatrixFocalPlanes = file.NumberOfOpticalPaths = 1
        file.Rows = file.Columns = TILE
        file.SamplesPerPixel, file.PhotometricInterpretation, file.PlanarConfiguration = 3, "YBR_FULL_422", 0
        file.BitsAllocated = file.BitsStored = 8
        file.HighBit, file.PixelRepresentation = 7, 0
        measures, groups = Dataset(), Dataset()
        measures.PixelSpacing = [MPP * 2**level / 1000] * 2
        measures.SliceThickness = 0.001
        groups.PixelMeasuresSequence = Items([measures])
        file.SharedFunctionalGroupsSequence = Items([groups])
        path = Dataset()
        path.OpticalPathIdentifier, path.ObjectiveLensPower = "1", 40
        file.OpticalPathSequence = Items([path])
        frames = [encode_jpeg(tile) for tile in cut(pixels)]
        file.NumberOfFrames = len(frames)
        file.PixelData = encapsulate(frames)
        file["PixelData"].is_undefined_length = True
        pydicom.dcmwrite(folder / name, file, enforce_file_format=True)
    return folder / names[0]
