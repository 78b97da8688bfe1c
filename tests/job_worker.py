"""One worker of a training job on several: `python job_worker.py DIRECTORY [STEP]`, with TF_CONFIG.

Runs jobs of several experiments into the directory, each with another way to ask for several workers, and prints what
it has in the end. With STEP it runs one of them only, and dies at that step if it is the second worker.
"""

import hashlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
from small_jobs import small_data, small_network, small_settings

from keras_sparse_init.training import Dynamic, Job, Prune, Scratch
from keras_sparse_init.training.progress import Progress

EXPERIMENTS = {
    "rigl": Dynamic(0.7, frequency=5),
    "pruned": Prune(0.7, begin_step=2, end_step=22, frequency=4),
    "scratch": Scratch(0.7),
}


def settings(**changes):
    return small_settings(steps=40, log_every=10, checkpoint_every=10, momentum=0.9, **changes)


def dying(step):
    """`Progress.on_step` that kills the process once it has written the row of a step."""
    on_step = Progress.on_step

    def die(self, now, logs):
        wrote = on_step(self, now, logs)
        if now >= step:
            os.kill(os.getpid(), signal.SIGKILL)
        return wrote

    return die


def main() -> None:
    warnings.filterwarnings("ignore")
    directory, index = Path(sys.argv[1]), json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    if len(sys.argv) > 2 and index == 1:
        Progress.on_step = dying(int(sys.argv[2]))
    # Before anything else of TensorFlow.
    job = Job(small_network, small_data(), EXPERIMENTS["rigl"], **settings(strategy="multi_worker"))
    strategy, found = job._devices._strategy, {"workers": job.settings["replicas"], "chief": job.is_chief}
    for name, experiment in EXPERIMENTS.items():
        if name != "rigl":
            if len(sys.argv) > 2:
                break
            with strategy.scope():
                job = Job(small_network, small_data(), experiment, **settings())
        with strategy.scope():
            job.run(directory / name)
        variables = [*job.model.variables, *job.model.optimizer.variables]
        found[name] = hashlib.sha256(b"".join(np.asarray(v).tobytes() for v in variables)).hexdigest()
    print("RESULT" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
