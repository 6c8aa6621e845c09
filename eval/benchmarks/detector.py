"""Object detection for GenEval without mmdet: a transformers Mask2Former, and a CLIP that classifies colours.

GenEval's own detector is mmdet's Mask2Former (Swin-S, COCO instances). This is the same network with the same
post-processing and transformers' weights. Scores name it in their protocol, since single boxes may differ from mmdet's.

Shapes: Q queries, K classes, N objects, H height, W width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from eval.benchmarks.geneval import REMEDY
from eval.benchmarks.geneval_rules import COLOURS, THRESHOLD, Box, DetectedObject, Requirement, confident, members_of
from eval.metrics.clipscore import Clip
from um3.core.distributed import device
from um3.core.errors import UserError
from um3.core.hub import load_pretrained

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


Instance = tuple[DetectedObject, NDArray]
"""A segmented object and its mask, bool (H, W)."""


class Mask2Former:
    """A Mask2Former of COCO instances from a folder or the hub, with mmdet's post-processing."""

    def __init__(self, path: str) -> None:
        """Load the model at `path`. Raises UserError: no such model, or one with other classes than COCO's 80."""
        from transformers import Mask2FormerForUniversalSegmentation
        from transformers.models.mask2former import Mask2FormerImageProcessorPil

        loaders: Any = (Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil)
        model, self.processor = (load_pretrained(loader, path, kind="Mask2Former", remedy=REMEDY) for loader in loaders)
        if model.config.num_labels != len(CLASSES):
            found = f"{path} has {model.config.num_labels} classes"
            raise UserError(f"{found}; GenEval needs COCO's {len(CLASSES)}; {REMEDY}")
        self.model = model.eval().to(device())

    @torch.inference_mode()
    def detect(self, image: Image.Image) -> list[Instance]:
        """The pairs of query and class with the highest scores: the class's probability times the mask's mean one."""
        inputs = self.processor(images=[image], return_tensors="pt")
        output = self.model(**{name: value.to(self.model.device) for name, value in inputs.items()})
        probabilities_QK = output.class_queries_logits[0].float().softmax(dim=-1)[:, :-1]
        scores_N, pairs_N = probabilities_QK.flatten().topk(min(MAX_DETECTIONS, probabilities_QK.numel()))
        pairs_N, scores_N = pairs_N[scores_N > THRESHOLD], scores_N[scores_N > THRESHOLD]
        if not len(pairs_N):
            return []
        num_classes = probabilities_QK.shape[1]
        masks_NHW = self._upsampled(output.masks_queries_logits[0, pairs_N // num_classes], inputs, image=image)
        inside_NHW = masks_NHW > 0
        area_N = inside_NHW.sum(dim=(1, 2))
        scores_N = scores_N * (masks_NHW.sigmoid() * inside_NHW).sum(dim=(1, 2)) / (area_N + 1e-6)
        detected = zip((pairs_N % num_classes).tolist(), scores_N.tolist(), inside_NHW.cpu().numpy(), strict=True)
        return [
            (DetectedObject(CLASSES[label], score, _box(mask_HW)), mask_HW)
            for label, score, mask_HW in detected
            if score > THRESHOLD
        ]

    def _upsampled(self, masks_NHW: torch.Tensor, inputs: Any, *, image: Image.Image) -> torch.Tensor:
        """Resize mask logits to the padded input, cut the padding off, and resize them to the image."""
        padded = F.interpolate(masks_NHW[None].float(), size=inputs["pixel_values"].shape[-2:], mode="bilinear")
        visible = inputs["pixel_mask"][0].bool()
        height, width = int(visible.any(dim=1).sum()), int(visible.any(dim=0).sum())
        return F.interpolate(padded[..., :height, :width], size=(image.height, image.width), mode="bilinear")[0]


def _box(mask_HW: NDArray) -> Box:
    left, top, right, bottom = map(float, Image.fromarray(mask_HW).getbbox() or (0, 0, 0, 0))
    return (left, top, right, bottom)


def objects_of(
    image: Image.Image, *, requirement: Requirement, detector: Mask2Former, clip: Clip | None
) -> list[DetectedObject]:
    """Detect the objects of an image, and classify the colour of those with a required colour."""
    instances = detector.detect(image)
    objects = [detected for detected, _ in instances]
    if clip is None or not requirement.needs_colour:
        return objects
    by_class = confident(objects, tag=requirement.tag)
    index_of = {id(detected): index for index, detected in enumerate(objects)}
    for group in requirement.include:
        if not group.color:
            continue
        members = [index_of[id(member)] for member in members_of(group, by_class=by_class)]
        crops = [cut_out(image, instances[index]) for index in members]
        for index, color in zip(members, colours_of(crops, name=group.name, clip=clip), strict=True):
            objects[index] = objects[index]._replace(color=color)
    return objects


def cut_out(image: Image.Image, instance: Instance) -> Image.Image:
    """Crop the object's box; pixels outside its mask are grey."""
    blank = Image.new("RGB", image.size, BACKGROUND)
    left, top, right, bottom = map(round, instance[0].box)
    box = (left, top, max(right, left + 1), max(bottom, top + 1))
    return Image.composite(image, blank, Image.fromarray(instance[1])).crop(box)


@torch.inference_mode()
def colours_of(crops: list[Image.Image], *, name: str, clip: Clip) -> list[str]:
    """Zero-shot classification of each crop of an object called `name` into GenEval's ten colours."""
    if not crops:
        return []
    texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in COLOUR_TEMPLATES]
    words = clip.text_tokenizer(texts, padding=True, return_tensors="pt").to(clip.model.device)
    pixels = clip.processor(crops, return_tensors="pt")["pixel_values"].to(clip.model.device)
    output = clip.model(**words, pixel_values=pixels)
    texts_KTD = F.normalize(output.text_embeds, dim=-1).unflatten(0, (len(COLOURS), len(COLOUR_TEMPLATES)))
    classes_KD = F.normalize(texts_KTD.mean(dim=1), dim=-1)
    best_N = (F.normalize(output.image_embeds, dim=-1) @ classes_KD.T).argmax(dim=1)
    return [COLOURS[index] for index in best_N.tolist()]
