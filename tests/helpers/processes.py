"""Processes for tests, forked from a server that has imported everything once: a start costs no 15 seconds of imports.

The server itself has run nothing (no threads, no CUDA), so that its children may do everything. Not a test file.
"""

import multiprocessing
import socket

import torch.multiprocessing

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["fastheads.demo.base", "ranks", "mmd_ranks", "standins"])


def start(run, *args):
    """A process that runs `run(*args)`; `run` can be imported by name."""
    process = _CONTEXT.Process(target=run, args=args)
    process.start()
    return process


def on_ranks(run, world, *args):
    """`run(rank, *args)` in `world` processes; an error in one of them is raised here."""
    torch.multiprocessing.start_processes(run, args, nprocs=world, start_method="forkserver")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
