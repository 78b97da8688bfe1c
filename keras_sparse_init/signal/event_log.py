"""Rows of numbers as logs that TensorBoard shows. Writing them needs TensorFlow alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class EventLog:
    """Writes scalars into a directory of event files, which holds nothing else.

    Args:
        directory: The directory. Event files of an interrupted run in it are replaced: their rows are written again.
    """

    def __init__(self, directory: Path) -> None:
        import tensorflow as tf

        for old in directory.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = tf.summary.create_file_writer(str(directory))
        # `tf.summary.scalar` needs the package tensorboard; the data that it writes are these.
        self._metadata = tf.compat.v1.SummaryMetadata(
            plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars")
        )

    def write(self, row: dict[str, Any]) -> None:
        """Writes a value for each name of a row but "step", which is their step."""
        import tensorflow as tf

        with tf.init_scope(), tf.device("cpu"), self._writer.as_default(step=int(row["step"])):
            for name, value in row.items():
                if name != "step":
                    tf.summary.write(name, tf.constant(value, tf.float32), metadata=self._metadata)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
