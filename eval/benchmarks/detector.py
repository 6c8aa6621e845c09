"""Objects in images for GenEval, without mmdet: a Mask2Former of transformers, and a CLIP that names colours.

GenEval's own detector is mmdet's Mask2Former (Swin-S, COCO instances). This is the same network and post-processing
from transformers' weights, so scores carry its name; no claim is made that every box is mmdet's.

Shapes: Q queries, K classes, N objects, H height, W width.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from eval.benchmarks.geneval_rules import COLOURS, THRESHOLD, Box, Demand, Found, chosen, confident
from eval.metrics.clipscore import Clip
from um3.core.distributed import device
from um3.core.errors import UserError

_NAMES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
    clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
CLASSES = tuple(name.strip() for name in _NAMES.split(","))
"""COCO's 80 classes in its order, under the names of GenEval's prompts (COCO says mouse, remote, keyboard)."""
MAX_DETECTIONS = 100
BACKGROUND = "#999"
COLOUR_TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)


class Detected(NamedTuple):
    """An object with its mask, bool (H, W)."""

    name: str
    score: float
    box: Box
    mask: NDArray


class Detector(Protocol):
    """Finds COCO's objects."""

    def detect(self, image: Image.Image) -> list[Detected]:
        """All objects surer than GenEval's lower threshold."""
        ...


class Mask2Former:
    """A Mask2Former of COCO instances from a folder or the hub, read out the way mmdet reads its own."""

    def __init__(self, path: str) -> None:
        """Load it.

        Raises:
            UserError: no such model, or one of other classes than COCO's 80.
        """
        from transformers import Mask2FormerForUniversalSegmentation
        from transformers.models.mask2former import Mask2FormerImageProcessorPil

        try:
            model: Any = Mask2FormerForUniversalSegmentation.from_pretrained(path)
            self.processor: Any = Mask2FormerImageProcessorPil.from_pretrained(path)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            remedy = "give the folder of facebook/mask2former-swin-small-coco-instance"
            raise UserError(f"no Mask2Former at '{path}' ({reason}); {remedy}") from None
        if model.config.num_labels != len(CLASSES):
            raise UserError(f"{path} tells {model.config.num_labels} classes, GenEval needs COCO's {len(CLASSES)}")
        self.model = model.eval().to(device())

    @torch.inference_mode()
    def detect(self, image: Image.Image) -> list[Detected]:
        """The surest pairs of query and class; a pair's score is its class's probability times its mask's."""
        inputs = self.processor(images=[image], return_tensors="pt")
        output = self.model(**{name: value.to(self.model.device) for name, value in inputs.items()})
        likely_QK = output.class_queries_logits[0].float().softmax(dim=-1)[:, :-1]
        scores_N, pairs_N = likely_QK.flatten().topk(min(MAX_DETECTIONS, likely_QK.numel()))
        pairs_N, scores_N = pairs_N[scores_N > THRESHOLD], scores_N[scores_N > THRESHOLD]
        if not len(pairs_N):
            return []
        num_classes = likely_QK.shape[1]
        masks_NHW = self._upsampled(output.masks_queries_logits[0, pairs_N // num_classes], inputs, image=image)
        inside_NHW = masks_NHW > 0
        area_N = inside_NHW.sum(dim=(1, 2))
        scores_N = scores_N * (masks_NHW.sigmoid() * inside_NHW).sum(dim=(1, 2)) / (area_N + 1e-6)
        found = zip((pairs_N % num_classes).tolist(), scores_N.tolist(), inside_NHW.cpu().numpy(), strict=True)
        return [
            Detected(CLASSES[label], score, _box(mask_HW), mask_HW)
            for label, score, mask_HW in found
            if score > THRESHOLD
        ]

    def _upsampled(self, masks_NHW: torch.Tensor, inputs: Any, *, image: Image.Image) -> torch.Tensor:
        """Mask logits at the image's own size: to the padded input's, without the padding, to the image's."""
        padded = F.interpolate(
            masks_NHW[None].float(), size=inputs["pixel_values"].shape[-2:], mode="bilinear", align_corners=False
        )
        visible = inputs["pixel_mask"][0].bool()
        height, width = int(visible.any(dim=1).sum()), int(visible.any(dim=0).sum())
        size = (image.height, image.width)
        return F.interpolate(padded[..., :height, :width], size=size, mode="bilinear", align_corners=False)[0]


def _box(mask_HW: NDArray) -> Box:
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1)


def objects_of(image: Image.Image, *, demand: Demand, detector: Detector, clip: Clip | None) -> list[Found]:
    """The objects of an image, with the colours of those whose colour its prompt demands."""
    detected = detector.detect(image)
    found = [Found(each.name, each.score, each.box) for each in detected]
    if clip is None or not demand.asks_colour:
        return found
    sure, places = confident(found, tag=demand.tag), {id(each): index for index, each in enumerate(found)}
    for group in demand.include:
        members = [places[id(each)] for each in chosen(group, found=sure)] if group.color else []
        crops = [cut_out(image, detected[index]) for index in members]
        for index, color in zip(members, colours_of(crops, name=group.name, clip=clip), strict=True):
            found[index] = found[index]._replace(color=color)
    return found


def cut_out(image: Image.Image, detected: Detected) -> Image.Image:
    """The object's box, everything that is not the object in grey."""
    blank = Image.new("RGB", image.size, BACKGROUND)
    left, top, right, bottom = map(round, detected.box)
    box = (left, top, max(right, left + 1), max(bottom, top + 1))
    return Image.composite(image, blank, Image.fromarray(detected.mask)).crop(box)


@torch.inference_mode()
def colours_of(crops: list[Image.Image], *, name: str, clip: Clip) -> list[str]:
    """The likeliest of GenEval's ten colours for each crop of an object called `name`, by CLIP without training."""
    if not crops:
        return []
    where = clip.model.device
    texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in COLOUR_TEMPLATES]
    words = clip.text_tokenizer(texts, padding=True, return_tensors="pt").to(where)
    pixels = clip.processor(crops, return_tensors="pt")["pixel_values"].to(where)
    output = clip.model(**words, pixel_values=pixels)
    texts_KTD = F.normalize(output.text_embeds, dim=-1).unflatten(0, (len(COLOURS), len(COLOUR_TEMPLATES)))
    classes_KD = F.normalize(texts_KTD.mean(dim=1), dim=-1)
    best_N = (F.normalize(output.image_embeds, dim=-1) @ classes_KD.T).argmax(dim=1)
    return [COLOURS[index] for index in best_N.tolist()]
