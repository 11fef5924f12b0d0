"""How far a process has read its stream, saved with every checkpoint."""

import json
import os
from typing import Any

from ..data.pairs import digest
from ..data.shards import ShardStream
from .arguments import MMGEMTrainingArguments
from .checkpoints import CheckpointError


class StreamProgress:
    """
    Holds the last position that came from each worker of this process's loader, and saves it as
    `stream_{process}.json` in a checkpoint.
    """

    def __init__(self, stream: ShardStream, args: MMGEMTrainingArguments):
        self.stream = stream
        self.args = args
        self.batches = 0
        self.positions: dict[int, Any] = {}

    def advance(self, worker: int, position: dict[str, Any]) -> None:
        """Counts one more batch, whose last example had this position."""
        self.positions[worker] = position
        self.batches += 1

    def save(self, checkpoint: str) -> None:
        state = {"readers": self._readers(), "data": self._data(), "batches": self.batches}
        with open(self._file(checkpoint), "w", encoding="utf-8") as file:
            json.dump({**state, "positions": self.positions}, file)

    def resume(self, checkpoint: str) -> None:
        """
        Makes the stream go on where the checkpoint left it.

        Raises:
            CheckpointError: if this is another stream, or other processes and workers read it.
        """
        try:
            with open(self._file(checkpoint), encoding="utf-8") as file:
                state = json.load(file)
        except FileNotFoundError as error:
            raise CheckpointError(f"{checkpoint} does not say how far a stream was: {error}") from error
        if state["data"] != self._data():
            raise CheckpointError(
                f"{checkpoint} read other data, or in another order. Go on with the same train_shards, shard_weights, "
                "shuffle_window, seed and batch size, or start anew with --init_from."
            )
        if state["readers"] != self._readers():
            raise CheckpointError(
                f"{checkpoint} was read by {state['readers']} (processes, workers each), not {self._readers()}: each "
                "reader has shards of its own, so go on with as many, or start anew with --init_from."
            )
        self.batches = state["batches"]
        self.positions = {int(worker): position for worker, position in state["positions"].items()}
        self.stream.start_from(self.batches, dict(self.positions))

    def _readers(self) -> list[int]:
        return [self.args.world_size, max(self.args.dataloader_num_workers, 1)]

    def _data(self) -> int:
        stream = self.stream
        data = [stream.sources, stream.weights.tolist(), stream.window, stream.seed, self.args.train_batch_size]
        return digest(json.dumps(data).encode())

    def _file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"stream_{self.args.process_index}.json")
