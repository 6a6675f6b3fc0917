"""``mlxarch serve``: answer HTTP clients."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxarch.cli import options

if TYPE_CHECKING:
    from mlxarch.language_model import LanguageModel
    from mlxarch.progress import Progress


@click.command("serve")
@click.argument("names", nargs=-1, metavar="[MODEL]...")
@click.option("--host", default="127.0.0.1", help="Address to listen on (default: 127.0.0.1)")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port (default: 8000)")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    metavar="KEY",
    envvar="MLXARCH_API_KEY",
    show_envvar=True,
    help="Key that clients must present; repeatable (default: none)",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 256),
    default=8,
    help="Requests answered at the same time (default: 8)",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(0, 10_000),
    default=64,
    help="Requests that may wait (default: 64)",
)
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(1),
    help="Maximum tokens of an answer whose request names none (default: until it ends)",
)
@click.option(
    "--keep-alive",
    type=float,
    default=600,
    metavar="SECONDS",
    help="Idle seconds until a model is unloaded; negative for never (default: 600)",
)
@click.option(
    "--allowed-hosts",
    multiple=True,
    metavar="NAME",
    help="Further name of this server in Host headers; repeatable (default: none)",
)
@click.option(
    "--allowed-origins",
    multiple=True,
    metavar="ORIGIN",
    help="Origin of web pages that may call, as https://example.org; repeatable (default: none)",
)
@click.option("--lenient", is_flag=True, help="Ignore unknown fields of requests, with a warning.")
@click.option(
    "--deterministic",
    is_flag=True,
    help="Make answers independent of other requests, bit for bit.",
)
@click.option(
    "--prefix-cache",
    type=options.ByteSize(),
    metavar="SIZE",
    help="Most memory for the caches of earlier prompts, e.g. 2GB (default: what "
    "running requests leave)",
)
@click.option(
    "--no-disk-cache",
    is_flag=True,
    help="Keep the caches of earlier prompts in memory only.",
)
@options.loading_options
def serve_command(names: tuple[str, ...], **given: Any) -> None:
    """Serve models to HTTP clients.

    The clients of OpenAI, Anthropic and Ollama find their APIs at http://127.0.0.1:8000. The first
    model is loaded at once, others when a request names them:

    \b
      mlxarch serve qwen3-8b
      mlxarch serve qwen3-8b smollm2-135m --port 8080
    """
    from mlxarch.system.backend import require_backend

    require_backend()
    references = list(names) or [options.resolve_model_name(None, None)]
    request = options.make_request(**given)
    folders = {
        _served_name(name): options.obtain_model(name, given["bits"], given["yes"], request=request)
        for name in references
    }

    def load(name: str, progress: "Progress") -> "LanguageModel":
        from mlxarch.language_model import load_folder

        settings = {key: given[key] for key in ("dtype", "wire", "slice")}
        return load_folder(folders[name], request, progress=progress, **settings)

    from mlxarch.hub.catalog import load_aliases
    from mlxarch.server.launch import serve
    from mlxarch.server.settings import Settings
    from mlxarch.system import paths

    settings = Settings(
        host=given["host"],
        port=given["port"],
        api_keys=given["api_keys"],
        allowed_hosts=frozenset(_split(given["allowed_hosts"])),
        allowed_origins=frozenset(_split(given["allowed_origins"])),
        lenient=given["lenient"],
        parallel=given["parallel"],
        max_waiting=given["max_waiting"],
        max_tokens=given["max_tokens"],
        idle_seconds=given["keep_alive"],
        deterministic=given["deterministic"],
        prefix_cache_bytes=given["prefix_cache"],
        prefix_cache_dir=None if given["no_disk_cache"] else paths.cache() / "prefix",
    )
    serve(list(folders), load, settings, load_aliases())


def _served_name(name: str) -> str:
    """Name of a model in requests: as it was given, and of a folder its last part."""
    path = Path(name)
    return path.resolve().name if path.exists() else name


def _split(values: tuple[str, ...]) -> list[str]:
    """Values of a repeatable option, of which each may hold several separated by commas."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]
