"""`nemoretriever serve`: serve models over HTTP with the API of a NIM."""

from __future__ import annotations

import argparse
import signal
from dataclasses import fields
from typing import Any

from shared_engine.cli.options import (
    LOCAL,
    add_key,
    add_logging,
    add_options,
    add_reranker,
    add_served_name,
    find_given,
    read_options,
    read_reranker,
)
from shared_engine.endpoints import read_key
from shared_engine.errors import ConfigurationError
from shared_engine.server.limits import ServerLimits

_LIMITS = fields(ServerLimits)
_OF_REPLICAS = {
    "replicas": (int, "Replicas behind one address, with Ray Serve. Default: one, without Ray."),
    "max_replicas": (int, "Maximum for autoscaling, from --replicas. Default: no autoscaling."),
    "cpus_per_replica": (float, "CPUs per replica. Default: divided evenly."),
    "gpus_per_replica": (float, "GPUs per replica, or a part of one. Default: 1 if available."),
}
"""Fields of `Replicas` that are arguments of the same name, with their type and help."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `serve` to the command line."""
    verb = commands.add_parser(
        "serve",
        help="serve models over HTTP with the API of a NIM",
        epilog="examples:\n"
        "  nemoretriever serve nvidia/llama-nemotron-embed-1b-v2 --port 8000\n"
        "  nemoretriever serve /folder --rerank-model nvidia/llama-nemotron-rerank-1b-v2\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("name", nargs="?", metavar="MODEL", help="Same as --model MODEL.")
    add_options(verb, LOCAL)
    add_served_name(verb)
    add_reranker(verb)
    verb.add_argument(
        "--rerank-served-name",
        metavar="NAME",
        help="Name of the reranker on the server. Default: that of --rerank-model.",
    )
    add_key(verb, "no key")
    verb.add_argument(
        "--host",
        default="127.0.0.1",
        help="Interface to bind. Default: %(default)s (loopback only).",
    )
    verb.add_argument("--port", type=int, default=8000, help="Port to bind. Default: %(default)s.")
    verb.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="Host name accepted without a key, as IP addresses and names without a dot are. "
        "Repeatable; may be a pattern: *.example.com. Default: none.",
    )
    verb.add_argument(
        "--default-input-type",
        choices=("query", "passage"),
        help="Role of texts whose request has none, for clients that cannot send input_type. "
        "Default: none; such a request is an error.",
    )
    for limit in _LIMITS:
        verb.add_argument(
            "--" + limit.name.replace("_", "-"),
            type=type(limit.default),
            default=limit.default,
            metavar="N",
            help=f"{limit.metadata['help']} Default: %(default)s.",
        )
    verb.add_argument(
        "--access-log",
        action="store_true",
        help="Log each request with its id, status, seconds, inputs and tokens; health probes only "
        "at --log-level debug. Not for replicas: Ray Serve has an access log.",
    )
    for name, (kind, text) in _OF_REPLICAS.items():
        verb.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    verb.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="Ray cluster for the replicas. Default: RAY_ADDRESS, or a new one on this machine.",
    )
    add_logging(verb, "info")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve models until a signal comes, then finish the accepted requests."""
    if args.name is not None:
        if args.model is not None:
            raise ConfigurationError(f"--model {args.model}: the model is given twice, {args.name}")
        args.model = args.name
    rerank_options = read_reranker(args)
    has_embedder = rerank_options is None or args.model or args.checkpoint or args.revision
    options = read_options(args, LOCAL, backend="local") if has_embedder else None
    key = read_key(args.api_key_env)  # for replicas, checked here rather than by each of them
    served: dict[str, Any] = {
        "rerank_options": rerank_options,
        "served_name": args.served_name,
        "rerank_served_name": args.rerank_served_name,
        "allowed_hosts": tuple(args.allowed_host),
        "limits": ServerLimits(**{each.name: getattr(args, each.name) for each in _LIMITS}),
        "default_input_type": args.default_input_type,
    }
    replicas = find_given(args, _OF_REPLICAS)
    if replicas or args.ray is not None:
        if args.access_log:
            raise ConfigurationError(
                "--access-log is for one process, and Ray Serve logs the requests of replicas in "
                "logs/serve of its session folder; remove it"
            )
        from shared_engine.distributed.serving import Replicas, serve_replicas

        settings = Replicas(options=options, api_key_env=args.api_key_env, **served, **replicas)
        serve_replicas(settings, address=args.ray, host=args.host, port=args.port)
        return 0
    from shared_engine.server import serve

    # The server handles the signal, stops, and raises it again: so it ends the process, without
    # waiting for a thread that computes.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        is_loaded = serve(
            options,
            host=args.host,
            port=args.port,
            api_key=key,
            access_log=args.access_log,
            **served,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    return 0 if is_loaded else 1  # the reason is logged
