"""The Trainer's evaluations while it trains."""

from typing import Any

import datasets
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.arguments import TableArguments
from ..data.loading import Table, checked_table
from ..data.pairs import PairDataset
from ..evaluation.evaluator import evaluate_model
from ..evaluation.sharing import gather_parts, report_failure
from ..evaluation.tasks import run_tasks
from ..processing import MMGEMProcessor
from .arguments import MMGEMTrainingArguments, data_seed
from .base_trainer import BaseTrainer
from .checkpoints import TrainingStopped
from .train_data import check_dataset


class EvaluatingTrainer(BaseTrainer):
    """A Trainer that evaluates retrieval and L_Gen, and whose run can go on after an evaluation that failed."""

    processing_class: MMGEMProcessor
    columns: dict[str, Any]  # names of a table's columns, by option
    evaluates_saved = False  # whether the saved files are evaluated after training, as train.py does

    def wrap_table(self, table: datasets.Dataset, args: MMGEMTrainingArguments, is_training: bool) -> PairDataset:
        """Wraps a plain table in the dataset class of this stage."""
        columns = TableArguments(**self.columns)
        rows = checked_table(Table(table), columns, ("image_column", "caption_column")).rows
        return PairDataset(rows, **self.columns, seed=data_seed(args))

    def _evaluate(self, trial: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        """
        Evaluates while training, as Trainer does.

        Raises:
            TrainingStopped: where the evaluation of any process fails, once the run is saved.
        """
        is_last = self.state.global_step >= self.state.max_steps
        is_only_of_the_saved = self.args.metric_for_best_model is None and not self.args.evaluation_config
        if is_last and self.evaluates_saved and is_only_of_the_saved:
            return {}  # the same figures come from the saved files
        self._mean_sums()
        try:
            metrics = super()._evaluate(trial, *args, **kwargs)
            best, names = self.args.metric_for_best_model, [name[5:] for name in metrics if name.startswith("eval_")]
            if best is not None and best.removeprefix("eval_") not in names:
                raise ValueError(f"metric_for_best_model {best!r} is none of {', '.join(names)}")
            gather_parts([])  # the last place at which another process can report its failure
            return metrics
        except Exception as error:
            report_failure(error)
            step, saved = self.state.global_step, "nothing was trained yet"
            if step > 0:
                self._save_checkpoint(self.model, trial)
                remedy = "to go on from with --resume_from_checkpoint true"
                if self.args.save_only_model:
                    remedy = "without its optimizer: start a new run from it with --init_from"
                saved = f"{PREFIX_CHECKPOINT_DIR}-{step} is saved, {remedy}"
            raise TrainingStopped(
                f"The evaluation at step {step} failed ({type(error).__name__}: {error}). Repair what it names, or "
                f"pass --eval_strategy no; {saved}."
            ) from error

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Computes and logs metrics of the held-out data; every process does its part."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, datasets.Dataset):
            dataset = self.wrap_table(dataset, self.args, is_training=False)
        check_dataset("eval_dataset", dataset, (PairDataset,))
        # Trainer's autocast covers forward alone; get_embedding and generate are to compute as training does.
        with self.accelerator.autocast():
            metrics = self._metrics(dataset)
        logs = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        self._start_interval()
        return logs

    def _metrics(self, dataset: Any) -> dict[str, float]:
        """Retrieval and held-out L_Gen, and what `--evaluation_config` asks for."""
        model = self.accelerator.unwrap_model(self.model)
        batch_size = self.args.per_device_eval_batch_size
        metrics = evaluate_model(model, self.processing_class, dataset, batch_size)[0]
        if self.args.evaluation_config:
            for section in run_tasks(model, self.processing_class, self.args.evaluation):
                metrics.update({f"suite_{name}": value for name, value in section.metrics.items()})
        return metrics
