"""Serve an engine over HTTP with OpenAI's API: the command `qwen-model serve`."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from .command_line import (
    add_engine_arguments,
    add_verbose_argument,
    load_settings,
    number_above_zero,
    positive_integer,
    run_command,
)
from .common.errors import QwenModelError
from .common.extras import import_extra

API_KEY_VARIABLE = "QWEN_MODEL_API_KEY"


def main(arguments: list[str] | None = None) -> None:
    """Serve until a signal ends it."""
    options = make_parser().parse_args(arguments)
    keys = _api_keys(options.api_key)
    for module in ("fastapi", "uvicorn", "msgspec", "prometheus_client"):
        import_extra(module, "the server", "serve")

    from .checkpoints.tokenizer import has_tokenizer
    from .engine import load_engine
    from .interface.engine_config import EngineConfig
    from .serving.context import ServerLimits
    from .serving.hosts import is_loopback
    from .serving.supervisor import ServerOptions, default_http_processes, serve

    engine_dir = Path(options.engine_dir)
    EngineConfig.read(engine_dir)
    if not has_tokenizer(engine_dir):
        raise QwenModelError("a server needs a tokenizer, and this engine has none")
    if not keys and not is_loopback(options.host):
        print(f"warning: whoever reaches {options.host} can use this server: it has no API key", file=sys.stderr)
    limits = ServerLimits(options.max_body_mib << 20, options.max_waiting, timeout=options.request_timeout)
    sys.exit(
        serve(
            ServerOptions(
                engine_dir=engine_dir,
                name=options.served_model_name or engine_dir.resolve().name,
                load=partial(load_engine, engine_dir, **load_settings(options)),
                host=options.host,
                port=options.port,
                http_processes=options.http_processes or default_http_processes(),
                api_keys=keys,
                allowed_origins=tuple(options.allow_origin),
                allowed_hosts=(options.host, *options.allowed_host),
                limits=limits,
                drain_seconds=options.drain_seconds,
                verbose=options.verbose,
            )
        )
    )


def _api_keys(given: list[str]) -> tuple[str, ...]:
    """Return the keys of the command line and of the environment.

    Raises:
        QwenModelError: a key is empty, which would let everybody in, or has white space around it.
    """
    keys = [("--api-key", key) for key in given]
    if API_KEY_VARIABLE in os.environ:
        keys.append((API_KEY_VARIABLE, os.environ[API_KEY_VARIABLE]))
    for source, key in keys:
        if not key.strip():
            raise QwenModelError(f"{source} is empty: give a key, or leave it out to serve without one")
        if key != key.strip():
            raise QwenModelError(f"the key of {source} begins or ends with white space, which no header keeps")
    return tuple(key for _, key in keys)


def make_parser() -> argparse.ArgumentParser:
    """Describe the command's options."""
    parser = argparse.ArgumentParser(
        prog="qwen-model serve", description="Serve an engine over HTTP, with OpenAI's API and a page to chat."
    )
    add_engine_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 is any free one (default: %(default)s)")
    parser.add_argument("--served-model-name", metavar="NAME", help="default: the engine folder's name")
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="demand this key; may be repeated; the variable QWEN_MODEL_API_KEY keeps it out of the list of processes",
    )
    parser.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="let pages of this site use the API"
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="without a key: answer requests to this name, too, beside localhost and addresses; may be repeated",
    )
    parser.add_argument(
        "--http-processes",
        type=positive_integer,
        metavar="N",
        help="beside the engine's (default: 1 for 4 cores, at most 4)",
    )
    parser.add_argument(
        "--max-waiting",
        type=positive_integer,
        default=1024,
        metavar="N",
        help="requests that may wait; more are refused with status 429 (default: %(default)s)",
    )
    parser.add_argument(
        "--max-body-mib", type=positive_integer, default=4, metavar="N", help="of a request (default: %(default)s)"
    )
    parser.add_argument(
        "--request-timeout", type=number_above_zero, default=600.0, metavar="SECONDS", help="default: %(default)s"
    )
    parser.add_argument(
        "--drain-seconds",
        type=number_above_zero,
        default=30.0,
        metavar="SECONDS",
        help="how long requests may go on after a first SIGINT, SIGTERM or SIGHUP (default: %(default)s)",
    )
    add_verbose_argument(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
