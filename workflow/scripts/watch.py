"""Show how far a run is on a page that stays open: stages, jobs, losses, speed, experts, memory, disk, log.

    watch.py                    the experiment below results/ that was active last
    watch.py results/demo       this one
    watch.py --port 8765        at a port of your choice, so that a tunnel can stay

Prints an address of this machine's loopback interface, and the ssh command that brings it to yours. Whoever has the
address, which no one can guess, sees the page; it is another one at each start. Only looks: it reads files and asks
squeue every half minute while somebody looks, writes nothing, and nothing runs on nodes. It goes on when the run has
ended, until Ctrl-C.

Exit codes: 0 ended by Ctrl-C; 2 no such experiment, or the port is taken.
"""

import getpass
import os
import signal
import threading
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli
from deepseek_sft.report import collect, live, live_server, status

ENDING_S = 10.0


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("results", type=Path, nargs="?", help="results/<experiment>; the one active last if not given")
    parser.add_argument("--logs", type=Path, help="folder of the experiment's logs; found beside RESULTS if not given")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0: a free one")
    arguments = parser.parse_args()
    if not 0 <= arguments.port < 1 << 16:
        parser.error("--port must be between 0 and 65535")
    results = arguments.results or status.newest_experiment(Path("results"), Path("logs"))
    watched = live.Watched(results, arguments.logs or collect.default_logs(results))
    refreshing = live.Refreshing(watched.page)
    server = live_server.Server(arguments.port, refreshing, results.name)
    port = server.server_address[1]
    print(f"watching {results}", f"  {server.address}", sep="\n")
    print(f"from another machine first: {live_server.tunnel(port, getpass.getuser())}")
    print("Ctrl-C ends it; the run does not notice", flush=True)
    end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: end.set())
    refreshing.start()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    end.wait()
    server.shutdown()
    server.server_close()
    if not refreshing.end(ENDING_S):
        os._exit(0)  # a file system that does not answer; to end Python beside a thread that draws would abort it


if __name__ == "__main__":
    cli.run(main)
