"""Environment workers, forked from one process that has imported what they need.

The tests start hundreds of workers, and imports are most of a start. `Worker` takes the place of
subprocess.Popen in common/envs/workers.py; whole scripts, as in test_end_to_end.py, start theirs
as their users do. This file run as a program is the process that forks.
"""

import os
import pickle
import select
import signal
import socket
import subprocess
import sys


class Worker:
    """A worker: what is asked of a subprocess.Popen. Takes what `_start_worker` gives that."""

    server: socket.socket | None = None  # is started for the first worker

    def __init__(self, command, *, pass_fds, env, stdin, process_group):
        assert command[1:4] == ["-P", "-m", "common.envs.workers"]
        assert stdin == subprocess.DEVNULL and process_group == 0
        if Worker.server is None:
            Worker.server, theirs = socket.socketpair()
            subprocess.Popen([sys.executable, "-P", __file__, str(theirs.fileno())],
                             pass_fds=[theirs.fileno()], env=env, stdin=stdin, process_group=0)
            theirs.close()
        status, theirs = os.pipe()
        self._status = open(status, "rb", buffering=0)
        request = pickle.dumps((env, os.getcwd()))
        socket.send_fds(Worker.server, [request], [*pass_fds, 1, 2, theirs])
        os.close(theirs)
        self.pid, self.returncode = int(self._status.read(10)), None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("worker", timeout)
            self.returncode = os.waitstatus_to_exitcode(int(self._status.read(10)))
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def serve(requests: socket.socket) -> None:
    """Fork for each request, until the tests have ended."""
    import metaworld.env_dict  # noqa: F401 - what else a worker needs

    import common.envs.gymnasium_suite
    import common.envs.metaworld_suite  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who look after workers
    while True:
        request, fds, *_ = socket.recv_fds(requests, 2**20, 5)
        if not request:
            return
        if os.fork() == 0:
            requests.close()
            look_after_worker(*pickle.loads(request), *fds)
        for fd in fds:
            os.close(fd)


def look_after_worker(env, folder, connection, memory, out, errors, status) -> None:
    """Tell a worker's process id, and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(status)
        work(env, folder, connection, memory, out, errors)
    for fd in (connection, memory, out, errors):
        os.close(fd)
    os.write(status, f"{pid:10}".encode())
    os.write(status, f"{os.waitpid(pid, 0)[1]:10}".encode())
    os._exit(0)


def work(env, folder, connection, memory, out, errors) -> None:
    import numpy as np

    from common.envs import workers

    os.setpgid(0, 0)
    os.chdir(folder)
    os.dup2(out, 1)
    os.dup2(errors, 2)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = env["PYTHONPATH"].split(os.pathsep)
    # Else what draws from it by mistake would draw the same in all workers.
    np.random.seed()  # noqa: NPY002
    try:
        workers._main(connection, memory)
    finally:
        os._exit(1)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
