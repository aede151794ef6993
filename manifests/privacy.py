"""What answers, logs and reports tell of files: nothing. Names of files at hospitals often hold names of people."""

import re

_START = r"""(?<![^\s"'(=\[{<,:|])(?!\d+(?:/\d+)+\b)"""  # 3/8 is no path.
_CLOSE = r"""(?:[:;"')\]](?:[:;"')\],]|\s|$)|$)"""  # A mark inside a name, as in `Doe (2).svs`, closes nothing.
_SUFFIX = (
    r"\.(?:svs|svslide|tiff?|ndpi|mrxs|scn|bif|vm[su]|dcm|czi|isyntax|zarr|zip|png|jpe?g|csv|txt|parquet|jsonl?|ya?ml"
    r"|pth?|safetensors|py|log|tmp)(?=\.?(?:[\s:;,\"')\]]|$))"
)
_WORD = r"""[^\s"'(=\[{<,:|\\/]+"""
_IN_CLAUSE = rf"(?:(?!{_CLOSE}).)*?"
_PATH = re.compile(
    rf"""
    (?<!\w["'])(?<=["']){_IN_CLAUSE}[\\/]{_IN_CLAUSE}(?:[\\/]|{_SUFFIX}){_IN_CLAUSE}(?={_CLOSE})  # 'Doe Jane/S 1.svs'
    | {_START}
      (?: (?:[a-z]:|[a-z][a-z\d+.-]+:(?=//)|~\w*)?[\\/](?!\s|$)  # /x, ~/x, C:\x, \\x, s3://x
        | {_WORD}[\\/]+{_WORD}[\\/]  # x/y/z
        | {_WORD}[\\/](?={_IN_CLAUSE}{_SUFFIX})  # x/Doe Jane.svs
      )
      {_IN_CLAUSE}(?:{_SUFFIX}|(?={_CLOSE}))
    """,
    re.MULTILINE | re.IGNORECASE | re.VERBOSE,
)


def without_paths(text: str) -> str:
    """The text with `[path]` for whatever is a path or an address.

    That is what begins with `/`, `~/`, a drive or a scheme, and what is relative with two separators or a known
    suffix; so `tiles/s` stays. Names of files hold spaces: a path reaches up to its suffix, without one up to a closing
    mark, in quotes up to the quote. Where that is not clear, rather too much than too little.
    """
    return _PATH.sub("[path]", text)
