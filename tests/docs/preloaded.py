"""Fast `python` and `xmc-trainer` commands for the tests of documentation: a server with all imports done forks for each command.

Importing torch and transformers takes most of a small command's time. On PATH, `python` and `xmc-trainer` are the few lines of
`CLIENT`. They pass their arguments, folder, environment and standard streams to the server and exit with its status.
"""

from __future__ import annotations

import array
import json
import os
import runpy
import socket
import sys
import traceback
from pathlib import Path

CLIENT = """\
#!{python} -SE
import array, json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
    streams = array.array("i", [0, 1, 2])
    server.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    server.sendall(request)
    sys.exit(int(server.recv(8) or 1))
"""


def write_clients(folder: Path, address: Path) -> None:
    for name in ("python", "xmc-trainer"):
        (folder / name).write_text(CLIENT.format(python=sys.executable, address=str(address)))
        (folder / name).chmod(0o755)


def _run(words: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> int:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    name = Path(words[0]).name
    try:
        if name == "xmc-trainer":
            from xmc_trainer.commands.cli import main

            sys.argv = words
            main()
        else:
            sys.argv = words[1:]
            sys.path[0] = str(Path(words[1]).resolve().parent)
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _serve(address: str) -> None:
    import xmc_trainer.model  # noqa: F401
    import xmc_trainer.trainer  # noqa: F401

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            client, _ = listener.accept()
            if os.fork():  # the commands of a pipe run at the same time
                client.close()
                continue
            streams = array.array("i")
            size, ancillary, *_ = client.recvmsg(8, socket.CMSG_LEN(3 * streams.itemsize))
            streams.frombytes(ancillary[0][2])
            request = b""
            while len(request) < int.from_bytes(size, "big"):
                request += client.recv(1 << 16)
            child = os.fork()
            if not child:
                status = _run(*json.loads(request), list(streams))
                for stream in (sys.stdout, sys.stderr):
                    if not stream.closed:
                        stream.flush()
                os._exit(status)
            client.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
            os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1])
