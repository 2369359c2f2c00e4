"""Held-out rows segmented while a model trains: what `segcompass evaluate` would say of it, at an interval.

The model writes its own reasoning, greedily, and its masks are compared with the true ones at the images' own size.
Knows nothing about losses or rewards.
"""

import logging
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput

from segcompass.loaders.masks import encode_mask
from segcompass.loaders.reasoning_segmentation.reasoning_segmentation import sample_counts, summarise
from segcompass.loaders.rows import row_image

from .closing import closing
from .rewards import format_score

logger = logging.getLogger(__name__)

PROTOCOL = "rela"
REPORTED = {"gIoU": "gIoU", "cIoU": "cIoU", "N-acc": "N_acc", "T-acc": "T_acc"}
"""{metric: its name in the log}; one that there are no samples for is left out."""


class HeldOutMasks(Trainer):
    """Segments the evaluation rows at each evaluation, beside what the trainer itself evaluates.

    A mixin before a class of transformers' `Trainer` with `args.eval_masks`, whose evaluation gets, for the prefix
    "eval": `eval_gIoU`, `eval_cIoU`, `eval_N_acc`, `eval_T_acc` (protocol "rela"), `eval_format_share` (of responses in
    the right format) and `eval_slots_found` (of K_s, on average).

    Example:
        class MyTrainer(HeldOutMasks, Trainer):
            ...
    """

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's, and the metrics of the masks beside its own.

        Args:
            dataloader: of the rows.
            description: see Trainer.
            prediction_loss_only: see Trainer.
            ignore_keys: see Trainer.
            metric_key_prefix: what the metrics' names begin with.

        Returns:
            Trainer's output, its `metrics` added to.

        Raises:
            ValueError: the model is sharded, so that it cannot write responses here.
        """
        rows = dataloader.dataset
        own = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if not getattr(self.args, "eval_masks", False):
            return super().evaluation_loop(*own)
        if not hasattr(rows, "__getitem__"):
            logger.warning("the evaluation rows are streamed, so they are not segmented; pass a datasets.Dataset.")
            return super().evaluation_loop(*own)
        if self.has_loss_on(rows):
            output = super().evaluation_loop(*own)
        else:
            self.model.eval()  # type: ignore[union-attr]
            nothing: Any = None  # what Trainer itself gives as predictions where it keeps none
            output = EvalLoopOutput(predictions=nothing, label_ids=None, metrics={}, num_samples=len(rows))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.segment_held_out(rows).items()}
        return output._replace(metrics={**(output.metrics or {}), **metrics})

    def has_loss_on(self, rows: Any) -> bool:
        """Whether the trainer's own evaluation can read these rows."""
        return True

    @torch.no_grad()
    def segment_held_out(self, rows: Any) -> dict[str, float]:
        """Segment rows with the model as it is now.

        Args:
            rows: of the shared schema; the processes share them.

        Returns:
            {name: value}, the same in every process.

        Raises:
            ValueError: the model is sharded, or there are no rows.
            OSError: an image that cannot be read; its sample is named.
        """
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "held-out rows are not segmented while weights are sharded (FSDP, ZeRO-3); leave out "
                "eval_dataset, and run `segcompass evaluate` on the checkpoints."
            )
        model: Any = self.accelerator.unwrap_model(self.model)
        core = model.get_base_model() if hasattr(model, "peft_config") else model
        was_training, processor = core.training, self.processing_class
        share = range(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        size = self.args.per_device_eval_batch_size
        records: list[dict[str, Any]] = []
        bar = tqdm(total=len(share), unit="sample", desc="held out", leave=False, disable=self.args.disable_tqdm)
        core.eval()
        try:
            with bar:
                for start in range(0, len(share), size):
                    batch = [rows[index] for index in share[start : start + size]]
                    records += self._segment(core, processor, batch)
                    bar.update(len(batch))
        finally:
            core.train(was_training)
        records = gather_object(records)
        summary = summarise(records, PROTOCOL)
        metrics = {name: summary[metric] for metric, name in REPORTED.items() if summary[metric] is not None}
        metrics["format_share"] = sum(record["format"] for record in records) / len(records)
        metrics["slots_found"] = sum(record["slots"] for record in records) / len(records)
        return metrics

    def _segment(self, core: Any, processor: Any, batch: list[dict]) -> list[dict[str, Any]]:
        """What a batch of rows adds to the metrics, one dict per row."""
        images = [row_image(row) for row in batch]
        features = getattr(self, "held_out_features", None)
        inputs = processor(images=images, text=[row["instruction"] for row in batch], image_encoder=features is None)
        if features is not None:
            inputs.update(features.inputs(images))
        query_source = getattr(self.args, "query_source", "both")
        options: dict[str, Any] = {}
        if getattr(self.args, "close_response", False):
            limit = core.config.max_response_length
            options = {"logits_processor": [closing(core, limit)], "max_new_tokens": limit}
        with self.accelerator.autocast():
            outputs = core.segment(**inputs.to(self.accelerator.device), query_source=query_source, **options)
        sizes = [(row["height"], row["width"]) for row in batch]
        results = processor.post_process_instance_segmentation(outputs, target_sizes=sizes)
        texts = processor.batch_decode(outputs.sequences[:, outputs.prompt_length :], skip_special_tokens=True)
        found = outputs.slot_mask.sum(-1).tolist()
        records = []
        for row, text, result, slots in zip(batch, texts, results, found, strict=True):
            masks = [encode_mask(mask) for mask in result["masks"].cpu().numpy()]
            counts = sample_counts(masks, row["masks"], row.get("ignore"), PROTOCOL)
            records.append({**counts, "format": format_score(text, processor.num_slots) > 0, "slots": slots})
        return records
