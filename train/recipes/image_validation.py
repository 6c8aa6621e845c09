"""Validation while a tokenizer trains: reconstruction, and in stage 1 contrast, on images that training never sees.

Legend: B images of a micro-batch, N images of a source, H, W pixels, C channels, P projection.
"""

import logging
from typing import Any

import numpy as np
import torch

from eval.metrics.reconstruction import psnr
from eval.tasks.validation_data import ValidationImages, validation_images
from tokenizer.losses import retrieval
from tokenizer.processor import QLIPProcessor
from train.engine import autocast
from train.settings.tokenizer import Stage1Config, Stage2Config
from um3.core.distributed import device
from um3.core.errors import UserError
from um3.core.metrics import Samples
from um3.core.progress import batches

logger = logging.getLogger(__name__)

NUM_SHOWN = 16


class ImageValidation:
    """The same validation images of every source each time. All ranks measure all of them, so nothing is summed."""

    def __init__(self, config: Stage1Config | Stage2Config, *, processor: QLIPProcessor):
        self.config, self.processor = config, processor
        sources = config.data.sources
        number = max(2, config.validation.num_images // len(sources))
        options: dict[str, Any] = {"size": processor.image_size, "seed": config.loop.seed}
        self.data: list[ValidationImages] = []
        for source in sources:
            try:
                self.data.append(validation_images(source, num_images=number, **options))
            except UserError as error:  # a few images of one's own, or val_fraction=0: they can train all the same
                logger.warning("'%s' is not validated while it trains: %s", source.name, error)
        self.shown: dict[str, Samples] = {}
        """Images of the last measurement, each with its reconstruction on the right."""

    def measure(self, engine: Any, *, micro_images: int) -> dict[str, float]:
        """PSNR of every source, and the contrastive loss and accuracy of stage 1 (a collective call)."""
        values: dict[str, float] = {}
        engine.eval()
        for data in self.data:
            rebuilt_NHWC, embeds = self._forward(engine, data, micro_images=micro_images)
            values[f"validation/psnr/{data.name}"] = float(psnr(rebuilt_NHWC, originals_BHWC=data.images).mean())
            pairs_NHWC = np.concatenate([data.images[:NUM_SHOWN], rebuilt_NHWC[:NUM_SHOWN]], axis=2)
            self.shown[f"validation/{data.name}"] = Samples(pairs_NHWC, data.full_captions[:NUM_SHOWN])
            if embeds and isinstance(self.config, Stage1Config) and self.config.loss.contrastive:
                image_NP, text_NP = embeds
                own_N, scale = torch.arange(len(image_NP), device=image_NP.device), image_NP.new_ones(())
                image_loss, accuracy = retrieval(image_NP, text_NP, own_N, scale)
                text_loss, _ = retrieval(text_NP, image_NP, own_N, scale)
                values[f"validation/contrastive/{data.name}"] = float((image_loss + text_loss) / 2)
                values[f"validation/accuracy/{data.name}"] = float(accuracy)
        engine.train()
        return values

    @torch.no_grad()
    def _forward(self, engine: Any, data: ValidationImages, *, micro_images: int) -> Any:
        """Reconstructions uint8 (N, H, W, 3), and in stage 1 the scaled image and the text embeddings (N, P)."""
        rebuilt, embeds = [], []
        for part in batches(len(data.images), batch_size=micro_images):
            pixels_BCHW = self.processor.pixels(data.images[part]).to(device())
            with autocast(self.config.engine):
                if isinstance(self.config, Stage1Config):
                    input_ids_BT = self.processor.text(data.full_captions[part])["input_ids"].to(device())
                    reconstructed_BCHW, *both = engine(pixels_BCHW, input_ids_BT, validates=True)
                    embeds.append([embeds_BP.float() for embeds_BP in both])
                else:
                    reconstructed_BCHW, _ = engine(pixels_BCHW)
            rebuilt.append(self.processor.images(reconstructed_BCHW.float()))
        return np.concatenate(rebuilt), [torch.cat(parts) for parts in zip(*embeds, strict=True)]
