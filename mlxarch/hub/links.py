"""Links to model pages, as people copy them from a browser, rewritten as names."""

import os
import re
from urllib.parse import unquote, urlsplit

from mlxarch.errors import ModelNotFound

_HUB_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
_OLLAMA_HOSTS = {"ollama.com", "www.ollama.com", "registry.ollama.ai"}
_OTHER_PAGES = {"datasets", "spaces", "collections", "papers", "docs", "blog", "settings"}
# Parts of a repository's pages that are followed by a revision
_REVISION_PAGES = {"tree", "blob", "resolve", "raw", "blame", "commit", "commits"}


def name_from_link(text: str) -> str | None:
    """Rewrite a link as ``org/name[@revision]`` or a short name; None if it is no known link.

    The scheme may be missing. Links into a repository (``/tree/main``, ``/blob/main/config.json``)
    mean the repository at that revision; query and fragment are ignored.

    Raises:
        ModelNotFound: the link leads to something else than a model, or to one file in GGUF.
    """
    link = urlsplit(text if "://" in text else f"https://{text}")
    host = (link.hostname or "").lower() if link.scheme in ("http", "https") else ""
    parts = [unquote(part) for part in link.path.split("/") if part]
    if host in _OLLAMA_HOSTS:
        return parts[-1] if parts else None
    if host not in _HUB_HOSTS | {_mirror_host()} or not host:
        return None
    if len(parts) < 2 or parts[0] in _OTHER_PAGES:
        raise ModelNotFound(
            f"{text!r} is no page of a model; a model's page is https://huggingface.co/org/name"
        )
    owner, name, *rest = parts
    name, colon, tag = name.partition(":")
    if colon or (rest and rest[-1].lower().endswith(".gguf")):
        wanted = tag or rest[-1]
        raise ModelNotFound(
            f"{text!r} asks for a GGUF file ({wanted}); download that file and give its path, or "
            f"name a repository with safetensors files, such as the one {owner}/{name} is made from"
        )
    revision = ""
    if len(rest) > 1 and rest[0] in _REVISION_PAGES:
        # refs/pr/N has slashes of its own
        length = 3 if re.match(r"refs/pr/\d+$", "/".join(rest[1:4])) else 1
        revision = "@" + "/".join(rest[1 : 1 + length])
    return f"{owner}/{name}{revision}"


def _mirror_host() -> str:
    """Host of the mirror that HF_ENDPOINT names, or an empty text."""
    return (urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname or "").lower()
