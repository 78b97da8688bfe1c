"""Two processes of `MultiWorkerMirroredStrategy` on this machine have the same masks and kernels, seeded or not."""

import json
import os
import socket
import subprocess
import sys

import worker_checks


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run_workers(script, *arguments, one_dies=False):
    """Runs a script in two processes, which are workers to each other.

    Returns:
        The processes, and what each has printed to stdout and stderr. When one is to die, the other, which would wait
        for it, is killed then.
    """
    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    processes = []
    for index in range(2):
        cluster = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(cluster), "PYTHONHASHSEED": str(index)}
        processes.append(
            subprocess.Popen(
                [sys.executable, script, *map(str, arguments)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        if one_dies:
            processes[1].wait(timeout=300)
            processes[0].kill()
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return processes, outputs


def test_kernels_and_masks_are_bitwise_equal_on_all_workers():
    processes, outputs = run_workers(worker_checks.__file__)
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    first, second = (json.loads(text.split("RESULT")[1]) for text, _ in outputs)
    assert first["workers"] == 2
    assert first == second
    unseeded = [value for name, value in first.items() if "None" in name]
    assert len(set(unseeded)) == len(unseeded) == 9
    # One seed is one network, whatever the wrapper.
    assert first["tfmot, seed 3, new"] == first["masked, seed 3, new"] != first["tfmot, seed None, new"]
