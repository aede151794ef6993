"""Encoders: every way of weights gives what timm gives; tokens are pooled by hand; what is frozen rests."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from torch import Tensor, nn
from torchvision import transforms

import trainer.encoders.foundation
from trainer.config import Encoder
from trainer.encoders.blueprint import plan_encoder
from trainer.encoders.encoder import TileEncoder, build_encoder, features_of
from trainer.encoders.foundation import FOUNDATIONS, Foundation
from trainer.errors import TrainerError

PX = 32
COLOURS: dict[str, Any] = {"mean": (0.6, 0.5, 0.4), "std": (0.3, 0.2, 0.1)}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Caches of this test's own, and no way out."""

    def connect(*_: object) -> None:
        raise AssertionError("a socket was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, connect)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def tiles_NHWC() -> Tensor:
    return torch.randint(0, 256, (3, PX, PX, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def timm_model(name: str = "test_resnet", **arguments: Any) -> nn.Module:
    """A model with weights and running statistics of its own, which no fresh model has."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model: nn.Module = timm.create_model(name, **{"num_classes": 0, **arguments}).eval()
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape) * 0.1)
    return model


def features_by_timm(model: nn.Module, tiles_NHWC: Tensor, **colours: Any) -> Tensor:
    """As timm's users do it: one picture after another through timm's transform."""
    data = {**timm.data.resolve_model_data_config(model), **colours}
    change = transforms.Compose([transforms.ToTensor(), transforms.Normalize(data["mean"], data["std"])])
    pictures = [change(Image.fromarray(tile.numpy())) for tile in tiles_NHWC]
    with torch.no_grad():
        features: Tensor = model(torch.stack(pictures))
    return features


def features_here(encoder: TileEncoder, tiles_NHWC: Tensor) -> Tensor:
    with torch.no_grad():
        return encoder(tiles_NHWC)


def write_snapshot(folder: Path, model: nn.Module, architecture: str, **model_args: Any) -> Path:
    """A folder as `hf download` leaves it: weights, and the config.json that timm writes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    own = timm.get_pretrained_cfg(architecture)
    data = {"input_size": (3, PX, PX), "fixed_input_size": own.fixed_input_size, "num_classes": 0, **COLOURS}
    data |= {"first_conv": own.first_conv, "classifier": own.classifier}
    content = {"architecture": architecture, "num_classes": 0, "model_args": model_args, "pretrained_cfg": data}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def write_cache(home: Path, repo: str, model: nn.Module, architecture: str, **model_args: Any) -> None:
    """The same, as huggingface_hub keeps what it downloaded."""
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    write_snapshot(root / "snapshots" / "abc123", model, architecture, **model_args)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc123")


def test_random_weights_follow_from_the_seed_as_timm_draws_them(tiles_NHWC: Tensor) -> None:
    torch.manual_seed(3)
    theirs = timm.create_model("test_resnet", num_classes=0).eval()
    torch.manual_seed(3)
    ours = build_encoder(Encoder(name="test_resnet"), PX)
    torch.testing.assert_close(features_here(ours, tiles_NHWC), features_by_timm(theirs, tiles_NHWC))
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    after = torch.rand(1)
    torch.manual_seed(3)
    timm.create_model("test_resnet", num_classes=0)
    assert torch.equal(torch.rand(1), after)  # What is drawn next, the aggregator, does not change either.


def _below(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + k: v for k, v in state.items()}


WRAPPED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "bare": lambda state: state,
    "state_dict of DDP": lambda state: {"epoch": 3, "state_dict": _below("module.", state)},
    "compiled": lambda state: {"state_dict": _below("_orig_mod.module.", state)},
    "DINO's teacher": lambda state: {
        "student": _below("module.backbone.", {k: torch.zeros_like(v) for k, v in state.items()}),
        "teacher": {**_below("backbone.", state), "head.mlp.0.weight": torch.zeros(4, 4)},
    },
    "a larger model": lambda state: {
        "model": {**_below("model.encoder.", state), "model.decoder.weight": torch.zeros(2)}
    },
    "a checkpoint of ours": lambda state: {"model": _below("backbone.", state), "optimizer": {"state": {}}},
    "with its head": lambda state: {**state, "fc.weight": torch.zeros(10, 96), "fc.bias": torch.zeros(10)},
    "half precision": lambda state: {k: v.half().to(v.dtype) if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_file_is_read_whatever_is_wrapped_around_its_tensors(how: str, tiles_NHWC: Tensor, tmp_path: Path) -> None:
    theirs = timm_model()
    state = WRAPPED[how](theirs.state_dict())
    torch.save(state, tmp_path / "weights.pth")
    if how == "half precision":
        theirs.load_state_dict(state)
    found = build_encoder(Encoder(name="test_resnet", weights=str(tmp_path / "weights.pth")), PX)
    torch.testing.assert_close(features_here(found, tiles_NHWC), features_by_timm(theirs, tiles_NHWC))
    assert "state_dict" not in found.backbone.pretrained_cfg  # type: ignore[operator]  # The file is not kept.


def test_safetensors_are_read(tiles_NHWC: Tensor, tmp_path: Path) -> None:
    theirs = timm_model()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    found = build_encoder(Encoder(name="test_resnet", weights=str(tmp_path / "weights.safetensors")), PX)
    torch.testing.assert_close(features_here(found, tiles_NHWC), features_by_timm(theirs, tiles_NHWC))


def test_a_downloaded_model_is_built_from_its_own_config(tiles_NHWC: Tensor, tmp_path: Path) -> None:
    theirs = timm_model("test_convnext")
    folder = write_snapshot(tmp_path / "model", theirs, "test_convnext")
    expected = features_by_timm(theirs, tiles_NHWC, **COLOURS)
    for weights in (folder, folder / "model.safetensors"):
        found = build_encoder(Encoder(name="hf-hub:hospital/own", weights=str(weights)), PX)
        torch.testing.assert_close(features_here(found, tiles_NHWC), expected)


@pytest.mark.parametrize("weights", [None, "pretrained"])
def test_a_hub_model_comes_from_the_cache_of_downloads(weights: str | None, tiles_NHWC: Tensor, tmp_path: Path) -> None:
    theirs = timm_model()
    write_cache(tmp_path / "hf", "Hospital/Own", theirs, "test_resnet")
    expected = features_by_timm(theirs, tiles_NHWC, **COLOURS)
    for name in ("hf-hub:Hospital/Own", "hf-hub:hospital/own", "hf-hub:Hospital/Own@main"):
        found = build_encoder(Encoder(name=name, weights=weights), PX)
        torch.testing.assert_close(features_here(found, tiles_NHWC), expected)
    with pytest.raises(TrainerError, match="hf download Hospital/Own --revision v2 --local-dir DIR"):
        build_encoder(Encoder(name="hf-hub:Hospital/Own@v2"), PX)


def test_the_cache_is_where_the_environment_says_now(
    tiles_NHWC: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(tmp_path / "elsewhere", "hospital/own", timm_model(), "test_resnet")
    with pytest.raises(TrainerError, match=r"no config.json of it on this machine"):
        build_encoder(Encoder(name="hf-hub:hospital/own"), PX)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere" / "hub"))
    found = build_encoder(Encoder(name="hf-hub:hospital/own"), PX)
    expected = features_by_timm(timm_model(), tiles_NHWC, **COLOURS)
    torch.testing.assert_close(features_here(found, tiles_NHWC), expected)


def test_pretrained_is_what_timm_would_download(tiles_NHWC: Tensor, tmp_path: Path) -> None:
    theirs = timm_model(num_classes=1000)
    write_cache(tmp_path / "hf", "timm/test_resnet.r160_in1k", theirs, "test_resnet")
    theirs.reset_classifier(0)  # type: ignore[operator]
    expected = features_by_timm(theirs, tiles_NHWC)
    for name in ("test_resnet", "test_resnet.r160_in1k"):
        found = build_encoder(Encoder(name=name, weights="pretrained"), PX)
        torch.testing.assert_close(features_here(found, tiles_NHWC), expected)


def test_pretrained_is_found_where_torch_downloads_to(tiles_NHWC: Tensor, tmp_path: Path) -> None:
    theirs = timm_model("resnet18", num_classes=1000)
    address = timm.get_pretrained_cfg("resnet18").url
    file = tmp_path / "torch" / "hub" / "checkpoints" / address.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(theirs.state_dict(), file)
    theirs.reset_classifier(0)  # type: ignore[operator]
    found = build_encoder(Encoder(name="resnet18", weights="pretrained"), PX)
    torch.testing.assert_close(features_here(found, tiles_NHWC), features_by_timm(theirs, tiles_NHWC))


def test_position_embeddings_are_resampled_to_the_tiles(tiles_NHWC: Tensor, tmp_path: Path) -> None:
    folder = write_snapshot(tmp_path / "model", timm_model("test_vit", img_size=96), "test_vit", img_size=96)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=PX, num_classes=0).eval()
    found = build_encoder(Encoder(name="hf-hub:hospital/own", weights=str(folder)), PX)
    assert found.backbone.pos_embed.shape == (1, 1 + 2 * 2, 64)  # type: ignore[union-attr]
    torch.testing.assert_close(features_here(found, tiles_NHWC), features_by_timm(theirs, tiles_NHWC, **COLOURS))


def test_a_checkpoint_of_ours_goes_back_into_the_same_model(tiles_NHWC: Tensor, tmp_path: Path) -> None:
    """Its position embeddings are those of its tiles, not of the pictures that timm's model was made for."""
    torch.manual_seed(0)
    trained = build_encoder(Encoder(name="test_vit"), PX)
    torch.save({"model": trained.state_dict(), "optimizer": {}}, tmp_path / "encoder.pt")
    again = build_encoder(Encoder(name="test_vit", weights=str(tmp_path / "encoder.pt")), PX)
    torch.testing.assert_close(features_here(again, tiles_NHWC), features_here(trained, tiles_NHWC))
    empty = build_encoder(Encoder(name="test_vit", weights="/gone/weights.pth"), PX, initial=False)
    empty.load_state_dict(trained.state_dict())
    torch.testing.assert_close(features_here(empty, tiles_NHWC), features_here(trained, tiles_NHWC))


def small_row(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A foundation model in small, shaped like Virchow2; returns what timm is called with."""
    arguments = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "reg_tokens": 4, "global_pool": ""}
    row = Foundation(
        repo="Lab/Small", architecture="test_vit", arguments=arguments, pooling="token+mean", licence="cc0", **COLOURS
    )
    monkeypatch.setitem(trainer.encoders.foundation.FOUNDATIONS, "small", row)
    return arguments


def test_a_foundation_model_has_what_its_config_leaves_out(
    tiles_NHWC: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = small_row(monkeypatch)
    theirs = timm_model("test_vit", img_size=PX, **arguments)
    tokens_NTD = features_by_timm(theirs, tiles_NHWC, **COLOURS)
    assert tokens_NTD.shape == (3, 1 + 4 + 4, 64)
    expected = torch.cat([tokens_NTD[:, 0], tokens_NTD[:, 5:].mean(1)], 1)
    # Classes of layers do not fit into JSON, and the colours are ImageNet's by mistake, as in a card's config.json.
    folder = write_snapshot(tmp_path / "model", theirs, "test_vit", img_size=PX, reg_tokens=4, global_pool="")
    content = json.loads((folder / "config.json").read_text())
    content["pretrained_cfg"] |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    (folder / "config.json").write_text(json.dumps(content))
    for name in ("small", "hf-hub:lab/small"):
        found = build_encoder(Encoder(name=name, weights=str(folder)), PX)
        assert found.num_features == 128
        torch.testing.assert_close(features_here(found, tiles_NHWC), expected)
    alone = build_encoder(Encoder(name="small", weights=str(tmp_path / "gone")), PX, initial=False)
    alone.load_state_dict(found.state_dict())  # Evaluation needs the run's checkpoint, and nothing else.
    torch.testing.assert_close(features_here(alone, tiles_NHWC), expected)


def test_what_a_config_says_goes_before_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {**small_row(monkeypatch), "reg_tokens": 2}
    folder = write_snapshot(
        tmp_path / "model", timm_model("test_vit", img_size=PX, **arguments), "test_vit", reg_tokens=2
    )
    found = build_encoder(Encoder(name="small", weights=str(folder)), PX)
    assert found.backbone.num_prefix_tokens == 3


# Widths and sizes as the models' cards give them; 0 where the card leaves the pooling open.
CARDS = {
    "uni": (1024, 16, 303),
    "uni2-h": (1536, 14, 681),
    "virchow": (2560, 14, 631),
    "virchow2": (2560, 14, 631),
    "h-optimus-0": (1536, 14, 1134),
    "h-optimus-1": (1536, 14, 1134),
    "h0-mini": (0, 14, 86),
    "prov-gigapath": (1536, 16, 1135),
    "phikon": (768, 16, 86),
}


def test_every_foundation_model_is_as_large_as_its_card_says() -> None:
    assert CARDS.keys() == FOUNDATIONS.keys()
    for name, (width, patch_px, millions) in CARDS.items():
        plan = plan_encoder(Encoder(name=name), 224)
        with torch.device("meta"), torch.no_grad():
            model = timm.create_model(plan.architecture, **plan.arguments).eval()
            features = features_of(model, torch.zeros(1, 3, 224, 224), plan.pooling)
        assert features.shape[1] == width if width else features.ndim == 3, name
        assert model.patch_embed.patch_size == (patch_px, patch_px), name
        assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1, name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "virchow2",
            "the weights of paige-ai/Virchow2 are not on this machine; it is gated, under the licence "
            "cc-by-nc-nd-4.0: accept that on its Hugging Face page, `hf download paige-ai/Virchow2 --local-dir DIR` "
            "on a machine with internet, then give --encoder.weights DIR",
        ),
        ("phikon", "not on this machine; its licence is owkin-non-commercial: `hf download 1aurent/"),
        ("hf-hub:hospital/own", "no config.json of it on this machine that names an architecture of timm; its licence"),
        ("test_vit", "its licence is apache-2.0: `hf download timm/test_vit.r160_in1k --local-dir DIR`"),
        ("test_convnext3", "test_convnext3 are not on this machine; "),
        ("test_vit4", "timm has none: give --encoder.weights FILE"),
    ],
)
def test_weights_that_are_not_here_are_told_with_the_way_to_them(name: str, message: str) -> None:
    with pytest.raises(TrainerError) as caught:
        build_encoder(Encoder(name=name, weights="pretrained"), 224)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


TOKENS = {"reg_tokens": 3, "global_pool": "", "img_size": PX}


def test_tokens_are_pooled_as_the_user_says(tiles_NHWC: Tensor, tmp_path: Path) -> None:
    theirs = timm_model("test_vit", **TOKENS)
    folder = str(write_snapshot(tmp_path / "model", theirs, "test_vit", **TOKENS))
    tokens_NTD = features_by_timm(theirs, tiles_NHWC, **COLOURS)
    token_ND, mean_ND = tokens_NTD[:, 0], tokens_NTD[:, 4:].mean(1)  # Three registers between them, in neither.
    expected = {"token": token_ND, "mean": mean_ND, "token+mean": torch.cat([token_ND, mean_ND], 1)}
    for pooling, features in expected.items():
        config = Encoder(name="hf-hub:hospital/own", weights=folder, pooling=pooling)  # type: ignore[arg-type]
        found = build_encoder(config, PX)
        assert found.num_features == features.shape[1]
        torch.testing.assert_close(features_here(found, tiles_NHWC), features)
    with pytest.raises(TrainerError, match=r"encoder.pooling is auto: expected token, mean or token\+mean, as hf-hub:"):
        build_encoder(Encoder(name="hf-hub:hospital/own", weights=folder), PX)


def test_models_that_average_keep_their_last_norm(tiles_NHWC: Tensor) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(Encoder(name="test_vit2", pooling="mean"), PX)
    nn.init.normal_(encoder.backbone.fc_norm.weight)  # type: ignore[union-attr,arg-type]
    theirs = features_by_timm(encoder.backbone, tiles_NHWC)
    torch.testing.assert_close(features_here(encoder, tiles_NHWC), theirs)
    encoder.pooling = "token"
    with torch.no_grad():
        x_NCHW = tiles_NHWC.permute(0, 3, 1, 2) / 127.5 - 1
        token_ND = encoder.backbone.fc_norm(encoder.backbone.forward_features(x_NCHW)[:, 0])  # type: ignore[union-attr,operator]
    torch.testing.assert_close(features_here(encoder, tiles_NHWC), token_ND)


def test_a_pooling_that_a_model_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"encoder.pooling is mean: expected auto, as test_resnet has no tokens"):
        build_encoder(Encoder(name="test_resnet", pooling="mean"), PX)
    arguments = {"class_token": False, "global_pool": "avg"}
    folder = write_snapshot(tmp_path / "m", timm_model("test_vit", img_size=PX, **arguments), "test_vit", **arguments)
    config = Encoder(name="hf-hub:hospital/own", weights=str(folder), pooling="token+mean")
    with pytest.raises(TrainerError, match="expected auto or mean, as hf-hub:hospital/own has no class token"):
        build_encoder(config, PX)


def test_tiles_that_a_model_cannot_take_are_refused_with_sizes_that_fit() -> None:
    with pytest.raises(
        TrainerError, match=r"50 px are no whole number of its patches of 16 px; 48 and 64 px are: tile"
    ):
        build_encoder(Encoder(name="test_vit"), 50)
    with pytest.raises(
        TrainerError, match=r"tiles of 50 px \(.*\); its own are 160 px: tile again with slidegrad tile"
    ):
        build_encoder(Encoder(name="test_maxvit"), 50)
    assert build_encoder(Encoder(name="test_resnet"), 50).num_features == 96


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (
            "test_resnet",
            lambda s: s.pop("layer1.0.bn1.bias"),
            "1 keys differ in name or shape, first layer1.0.bn1.bias",
        ),
        ("test_resnet", lambda s: s.update(more=torch.zeros(1)), "1 keys differ in name or shape, first more"),
        (
            "test_resnet",
            lambda s: s.update({"bn1.bias": torch.zeros(5)}),
            "1 keys differ in name or shape, first bn1.bias",
        ),
        (
            "test_vit",
            lambda s: s.pop("blocks.1.attn.qkv.weight"),
            "1 keys differ in name or shape, first blocks.1.attn.qkv.weight",
        ),
        (
            "test_vit",
            lambda s: s.update({"patch_embed.proj.weight": torch.zeros(64, 3, 14, 14)}),
            "1 keys differ in name or shape, first patch_embed.proj.weight",
        ),
        (
            "dla46x_c",
            lambda s: s.pop("base_layer.0.weight"),
            "1 keys differ in name or shape, first base_layer.0.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    name: str, spoil: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    state = timm_model(name, **({"img_size": PX} if name == "test_vit" else {})).state_dict()
    spoil(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(TrainerError, match=f"do not fit the model, {message}"):
        build_encoder(Encoder(name=name, weights=str(tmp_path / "weights.pth")), PX)


def test_files_and_folders_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    def refused(weights: Path) -> str:
        with pytest.raises(TrainerError) as caught:
            build_encoder(Encoder(name="test_resnet", weights=str(weights)), PX)
        return str(caught.value)

    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    assert "not readable" in refused(tmp_path / "torn.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "expected tensors by name, found none" in refused(tmp_path / "list.pt")
    assert "expected one weights file, found list.pt, torn.safetensors; give the file" in refused(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "found none" in refused(tmp_path / "empty")
    assert "no such file or folder" in refused(tmp_path / "gone")


def test_no_code_of_a_weights_file_runs(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(TrainerError, match="not readable"):
        build_encoder(Encoder(name="test_resnet", weights=str(tmp_path / "weights.pth")), PX)
    assert not (tmp_path / "ran").exists()


def test_a_folder_of_another_model_is_refused_under_a_name_of_timm(tmp_path: Path) -> None:
    folder = write_snapshot(tmp_path / "model", timm_model(), "test_resnet")
    with pytest.raises(TrainerError, match=r"of a test_resnet, but encoder.name is 'test_convnext'"):
        build_encoder(Encoder(name="test_convnext", weights=str(folder)), PX)
    with pytest.raises(
        TrainerError, match=r"asks for other colours than timm's test_resnet; give --encoder.name hf-hub:"
    ):
        build_encoder(Encoder(name="test_resnet", weights=str(folder)), PX)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Encoder(name="virchow3"), "encoder.name 'virchow3': timm does not know it; near: virchow"),
        (Encoder(name="test_vit.tag"), "encoder.name 'test_vit.tag': timm does not know it; near: test_vit"),
        (
            Encoder(name="vgg11", drop_path=0.1),
            "encoder.name 'vgg11': cannot be built with num_classes, drop_path_rate",
        ),
        (
            Encoder(name="test_resnet", freeze=9),
            "encoder.freeze is 9: expected below 4, the number of its blocks, or all",
        ),
        (Encoder(name="test_vit", freeze=6), "encoder.freeze is 6: expected below 6"),
        (
            Encoder(name="pit_xs_224", freeze=1),
            "encoder.freeze is 1: not possible with pit_xs_224, of which timm does not",
        ),
        (Encoder(name="pit_xs_224", layer_decay=0.5), "encoder.layer_decay is 0.5: not possible with pit_xs_224"),
    ],
)
def test_settings_that_a_model_cannot_have_are_refused(config: Encoder, message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        build_encoder(config, 224)


def in_scoring(encoder: TileEncoder) -> set[str]:
    return {name for name, module in encoder.backbone.named_modules() if not module.training}


def test_a_number_freezes_the_stem_and_so_many_blocks(tiles_NHWC: Tensor) -> None:
    encoder = build_encoder(Encoder(name="test_resnet", freeze=2, drop_path=0.5), PX).train()
    frozen = {name for name, p in encoder.backbone.named_parameters() if not p.requires_grad}
    tops = {".".join(name.split(".")[: 2 if name.startswith("layer") else 1]) for name in frozen}
    assert tops == {"conv1", "bn1", "layer1.0", "layer2.0"}
    resting = in_scoring(encoder)
    assert {"conv1", "bn1", "layer1", "layer1.0.bn1", "layer2.0.drop_path"} <= resting
    assert not resting & {"", "layer3", "layer3.0", "layer3.0.bn1", "layer4.0.drop_path"}
    encoder(tiles_NHWC).sum().backward()
    assert all((p.grad is None) is (n in frozen) for n, p in encoder.backbone.named_parameters())
    before = encoder.backbone.bn1.running_mean.clone()  # type: ignore[union-attr,operator]
    encoder(tiles_NHWC)
    assert torch.equal(encoder.backbone.bn1.running_mean, before)  # type: ignore[union-attr,arg-type]
    assert in_scoring(encoder.eval()) == {name for name, _ in encoder.backbone.named_modules()}


def test_a_frozen_stem_of_tokens_rests_and_its_blocks_train() -> None:
    encoder = build_encoder(Encoder(name="test_vit", freeze=1), PX).train()
    resting = in_scoring(encoder)
    assert {"", "patch_embed", "patch_embed.proj", "blocks.0", "blocks.0.attn.qkv"} <= resting
    assert not resting & {"blocks", "blocks.1", "blocks.5.mlp.fc1", "norm"}
    named = dict(encoder.backbone.named_parameters())
    assert not named["cls_token"].requires_grad
    assert not named["pos_embed"].requires_grad
    assert named["norm.weight"].requires_grad


def test_all_frozen_is_scoring_mode_throughout(tiles_NHWC: Tensor) -> None:
    encoder = build_encoder(Encoder(name="test_resnet", freeze="all"), PX).train()
    assert not any(module.training for module in encoder.modules())
    assert not encoder(tiles_NHWC).requires_grad


def test_nothing_frozen_is_training_mode_throughout() -> None:
    encoder = build_encoder(Encoder(name="test_resnet"), PX).train()
    assert all(module.training for module in encoder.modules())


def test_weights_that_hold_no_numbers_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    state["bn1.bias"][0] = torch.nan
    torch.save(state, file := tmp_path / "weights.pth")
    with pytest.raises(TrainerError, match=r"1 tensors hold no numbers \(NaN, inf\), first bn1\.bias"):
        build_encoder(Encoder(name="test_resnet", weights=str(file)), 32)
