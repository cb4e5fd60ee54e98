"""Pictures and masks in ComfyUI's graphs, cut and scaled by its nodes as they are here.

`media.pictures` scales a picture to cover the size that is drawn and cuts out its middle, and
marks every pixel of a mask that something white reaches into. ComfyUI's own "center" crops before
it scales, which gives other pixels, so the two steps are two nodes.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from twostep.pipeline.graph_nodes import Graph, Link, output
from twostep.pipeline.request import Picture

_PIXELS_PER_LATENT = 8
"""Of SDXL, the one model here that ComfyUI has."""

_HALF = 0.5
"""What is above counts as white: 128 of 255 and more."""

_ALL_WHITE = 0xFFFFFF


def is_readable(picture: Picture) -> bool:
    """Tell whether ComfyUI's LoadImage gives the pixels of a picture that are used here."""
    return picture.pixels is not None and picture.is_eight_bit


def is_readable_mask(picture: Picture) -> bool:
    """Tell whether a mask is grey, so that one of its channels says where it is white."""
    if not is_readable(picture):
        return False
    pixels = np.asarray(picture.image)
    return bool((pixels == pixels[..., :1]).all())


def add_picture(graph: Graph, picture: Picture, size: tuple[int, int]) -> Link:
    """Add what loads a picture, on white, and cuts it to a size (width, height)."""
    return _cut(graph, _on_white(graph, picture), picture, size, method="lanczos")


def add_mask(graph: Graph, picture: Picture, size: tuple[int, int]) -> Link:
    """Add what makes a mask of pixels at a size (width, height): 1 is drawn anew."""
    if picture.is_white_on_nothing:
        # Strokes on an empty layer: what is opaque is drawn anew.
        loaded = graph.add("LoadImage", image=file_name(picture))
        mask = graph.add("InvertMask", mask=output(loaded, 1))
    else:
        mask = graph.add("ImageToMask", image=_on_white(graph, picture), channel="red")
    marked = graph.add("ThresholdMask", mask=mask, value=_HALF)
    if picture.image.size == size:
        return marked
    # "area" averages over all pixels that a new one overlaps, so what is above 0 was touched.
    shown = graph.add("MaskToImage", mask=marked)
    scaled = _cut(graph, shown, picture, size, method="area")
    return _touched(graph, scaled)


def add_latent_mask(graph: Graph, mask: Link, size: tuple[int, int]) -> Link:
    """Add what marks every latent that a mask of pixels touches."""
    width, height = size
    scaled = graph.add(
        "ImageScale",
        image=graph.add("MaskToImage", mask=mask),
        upscale_method="area",
        width=width // _PIXELS_PER_LATENT,
        height=height // _PIXELS_PER_LATENT,
        crop="disabled",
    )
    return _touched(graph, scaled)


def add_pasted(graph: Graph, image: Link, drawn: Link, mask: Link) -> Link:
    """Add what puts drawn pixels into an image where a mask says so."""
    return graph.add(
        "ImageCompositeMasked",
        destination=image,
        source=drawn,
        x=0,
        y=0,
        resize_source=False,
        mask=mask,
    )


def _on_white(graph: Graph, picture: Picture) -> Link:
    """Add what loads a picture, with white where it is transparent."""
    loaded = graph.add("LoadImage", image=file_name(picture))
    if picture.alpha is None:
        return loaded
    width, height = picture.image.size
    white = graph.add("EmptyImage", width=width, height=height, batch_size=1, color=_ALL_WHITE)
    return add_pasted(graph, loaded, white, output(loaded, 1))


def _cut(
    graph: Graph, image: Link, picture: Picture, size: tuple[int, int], *, method: str
) -> Link:
    """Add what scales an image to cover a size (width, height), and cuts out its middle."""
    if picture.image.size == size:
        return image
    # One bit a pixel: only how large it comes out is of interest.
    covering = ImageOps.cover(Image.new("1", picture.image.size), size)
    scaled = image
    if covering.size != picture.image.size:
        scaled = graph.add(
            "ImageScale",
            image=image,
            upscale_method=method,
            width=covering.width,
            height=covering.height,
            crop="disabled",
        )
    width, height = size
    if covering.size == size:
        return scaled
    return graph.add(
        "ImageCrop",
        image=scaled,
        width=width,
        height=height,
        x=(covering.width - width) // 2,
        y=(covering.height - height) // 2,
    )


def _touched(graph: Graph, image: Link) -> Link:
    """Add what marks every pixel that is not quite black."""
    mask = graph.add("ImageToMask", image=image, channel="red")
    return graph.add("ThresholdMask", mask=mask, value=0.0)


def file_name(picture: Picture) -> str:
    """Return the name under which a picture is looked for in ComfyUI's folder of inputs.

    One that came without a file is called by its hash, so that several keep apart.
    """
    return picture.name or f"{picture.sha256[:12]}.png"
