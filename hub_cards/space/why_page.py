"""The answer as HTML: words, concepts, places and mask side by side, and what would move it. Every string is escaped.

The page keeps its shape from the first moment on: each part has its place and its size before there is anything in it
(`page.css`), so nothing moves while the reasoning is written. What lights up what is in `data-c` (numbers of concepts),
which `page.js` reads. Knows nothing about the model or about gradio.
"""

import base64
import io
import json
import re
from html import escape
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from why import TOP_CONCEPTS, Concept, Key, Slot, Why, confidence, moved, needed

COLOURS = (  # those of modeling_segcompass/palette.py, which a Space's own repository does not hold
    (230, 60, 50),
    (50, 120, 230),
    (60, 180, 75),
    (245, 190, 40),
    (160, 80, 200),
    (40, 190, 200),
    (232, 51, 139),
    (192, 116, 74),
)
LONGEST = 640
"""Pixels of the longest side of a picture on the page."""
FAINT = 0.05
"""Words of which a mask reads less than this share are not marked."""
WORDS_NAMED = 2
"""How many of its words a concept names."""
SPOTS = 16
"""The places that one can point at, in each direction."""
KINDS = {"look": "how a thing looks", "place": "where a thing is"}
MARKS = re.compile(r"\s*(</?think>|<REF_POS>)")
"""What the response says to the program and not to its reader."""


def waiting_page(text: str = "", note: str = "") -> str:
    """The page before and while an answer is written.

    Args:
        text: what was written so far.
        note: instead of it, such as how many wait.

    Returns:
        HTML.
    """
    written = escape(MARKS.sub("", text))
    said = f"<p class='text'>{written}</p>" if text else f"<p class='text hint'>{escape(note)}</p>"
    rows = "<div class='concept blank'></div>" * TOP_CONCEPTS
    steps = _chain(
        said,
        rows,
        _blank("the places appear here"),
        _blank("the mask appears here"),
        ("", "", "", ""),
    )
    lower = _lower(
        "<p class='hint'>When there is a mask: switch a concept off, double it, or put another in its place.</p>",
        f"<div class='pair'>{_figure('before', _blank(''), '')}{_figure('after', _blank(''), '')}</div>",
    )
    verdict = "writing …" if text else ""
    busy = " data-busy" if text or note else ""
    shown = f"<div><div class='slot'>{steps}</div></div>"  # nested as an answer is: gradio changes the page in place
    return f"<div class='why' data-answer=''{busy}>{_top(verdict, '')}{shown}{lower}</div>"


def answer_page(why: Why, image: Image.Image, concepts: list[Key], swaps: dict[str, str], name: str) -> str:
    """The page with an answer.

    Args:
        why: the account of it.
        image: PIL image, RGB.
        concepts: the concepts by the number that the page knows them by; those of `why` are among them.
        swaps: names that may be put in a concept's place, each with its kind, "look" or "place".
        name: of the answer, so that the page knows a new one.

    Returns:
        HTML.
    """
    shown = image.copy()
    shown.thumbnail((LONGEST, LONGEST))
    numbers = {key: number for number, key in enumerate(concepts)}
    titles = {slot.number: _title(slot, place) for place, slot in enumerate(why.slots)}
    tabs = "".join(_tab(slot, titles[slot.number]) for slot in why.now)
    defs = (
        f"<svg class='defs' aria-hidden='true'><defs><image id='why-photo' width='{shown.width}' "
        f"height='{shown.height}' href='{_jpeg(shown)}'/></defs></svg>"
    )
    sections = "".join(_section(why, slot, shown, numbers) for slot in why.now)
    if not why.slots:
        text = f"<p class='text'>{escape(MARKS.sub('', ''.join(why.words)))}</p>"
        nothing = _chain(text, "", _blank("no heatmap"), _picture(shown, "", "the image"), ("", "", "", ""))
        sections = f"<div class='slot'>{nothing}</div>"
    pairs = "".join(_pair(why, slot, shown, titles[slot.number]) for slot in why.slots)
    needs = "".join(f"<p class='note' data-slot='{slot.number}'>{escape(needed(slot))}</p>" for slot in why.now)
    lower = _lower(f"{needs}{_controls(why, concepts, swaps)}", pairs)
    head = _top(why.verdict, tabs)
    return f"<div class='why' data-answer='{escape(name)}'>{head}<div>{sections}</div>{lower}{defs}</div>"


# -- the parts ---------------------------------------------------------------------------------------------------------


def _top(verdict: str, tabs: str) -> str:
    return (
        f"<div class='top'><p class='verdict' role='status' id='verdict'>{escape(verdict)}</p>"
        f"<div class='tabs' role='group' aria-label='Which mask to explain'>{tabs}</div></div>"
    )


def _title(slot: Slot, place: int) -> str:
    return f"mask {place + 1}" if slot.kept else "best guess"


def _tab(slot: Slot, name: str) -> str:
    return (
        f"<button type='button' class='tab' data-slot='{slot.number}' style='{_tint(slot)}' "
        f"aria-pressed='false'><i class='dot'></i>{name}"
        f"<small>confidence {confidence(slot.confidence)}</small></button>"
    )


def _chain(words: str, rows: str, heat: str, mask: str, captions: tuple[str, str, str, str]) -> str:
    steps = (
        ("words", "It wrote", words),
        ("concepts", "Words fire concepts", f"<div class='rows'>{rows}</div>"),
        ("places", "Concepts add heat", heat),
        ("mask", "Heat becomes the mask", mask),
    )
    return "<div class='chain'>" + "".join(
        f"<div class='step {kind}'><h2><b>{number}</b>{title}</h2>{body}<p class='caption'>{caption}</p></div>"
        for number, ((kind, title, body), caption) in enumerate(zip(steps, captions, strict=True), 1)
    ) + "</div>"  # fmt: skip


def _lower(controls: str, pairs: str) -> str:
    return (
        f"<div class='lower'><div class='step controls'><h2><b>5</b>What would move it</h2>{controls}</div>"
        f"<div class='step pairs'>{pairs}</div></div>"
    )


def _section(why: Why, slot: Slot, image: Image.Image, numbers: dict[Key, int]) -> str:
    strongest = max((float(concept.heat.max()) for concept in slot.concepts), default=0.0) or 1.0
    parts = "".join(_part(slot, concept, numbers, strongest, image) for concept in slot.concepts)
    rows = "".join(_row(why, slot, concept, numbers[concept.key], image) for concept in slot.concepts)
    rows += "<div class='concept blank'></div>" * (TOP_CONCEPTS - len(slot.concepts))
    total = _layer(_total(slot), slot, image, kind="total")
    spots = json.dumps(_spots(slot, numbers, strongest))
    heat = _picture(image, f"{parts}{total}", "heatmap", grey=True, more=f"data-spots='{spots}'")
    others = [other for other in why.kept if other.number != slot.number]
    drawn = "".join(_mask(other, image, fill=0) for other in others) + _drawn(slot, image)
    mask = _picture(image, drawn + _uses(slot, numbers), "mask", more=f"data-spots='{spots}'")
    place = "all together" if why.additive else "the heatmap; in this read-out the places do not add up to it"
    place += "" if slot.kept or not slot.concepts else ", brightened: the heat is low"
    drawn_as = "drawn where the heat is" if slot.kept else "what it would have drawn, faint: not kept"
    when = "<b>after the changes:</b> " if why.changes else ""
    others_share = f" (all others {slot.rest:.0%})" if slot.rest >= 0.005 else ""
    known = any(concept.lost is not None for concept in slot.concepts)
    takes = "; dark: how much of the mask goes without it" if known else ""
    captions = (
        "stronger colour: the mask reads more of the word, and of what led to it",
        f"{when}coloured: its share of the heat{others_share}{takes}",
        f"{when}<span class='place' data-all='{escape(place)}'>{escape(place)}</span>",
        f"{when}{drawn_as}",
    )
    return (
        f"<div class='slot' data-slot='{slot.number}' style='{_tint(slot)}'>"
        f"{_chain(_text(why, slot, numbers), rows, heat, mask, captions)}</div>"
    )


def _text(why: Why, slot: Slot, numbers: dict[Key, int]) -> str:
    """The response; words that the slot read, or that fire its concepts, can be pointed at."""
    linked: dict[int, list[int]] = {}
    for concept in slot.concepts:
        for word in concept.words:
            if slot.read.get(word, 0) >= FAINT:
                linked.setdefault(word, []).append(numbers[concept.key])
    parts = []
    for number, word in enumerate(why.words):
        share = slot.read.get(number, 0.0)
        if number not in linked and share < FAINT:
            parts.append(escape(MARKS.sub("", word)))
            continue
        space = " " if word[:1].isspace() else ""
        fired = " ".join(map(str, linked.get(number, [])))
        phrase = slot.phrases.get(number, "").strip()
        together = f" It is read as “{phrase}”." if phrase not in ("", word.strip()) else ""
        told = (
            f"{share:.0%} of what this mask reads comes from this word."
            if why.additive
            else f"This mask reads the word {share:.0%} as strongly as its strongest one."
        )
        parts.append(
            f"{space}<button type='button' class='word' data-c='{fired}' style='--share:{share:.2f}' "
            f"title='{escape(told + together)}'>{escape(word.strip())}</button>"
        )
    return f"<p class='text'>{''.join(parts)}</p>"


def _row(why: Why, slot: Slot, concept: Concept, number: int, image: Image.Image) -> str:
    named = sorted(concept.words, key=lambda word: -concept.words[word])
    named = list(dict.fromkeys(why.words[word].strip() for word in named if why.words[word].strip()))[:WORDS_NAMED]
    source = "from " + ", ".join(f"“{escape(word)}”" for word in named) if named else ""
    replaced = [escape(str(why.names.get(key, key))) for key, other in why.changes.items() if other == concept.key]
    source = f"in place of {', '.join(replaced)}" if replaced else source
    change = why.changes.get(concept.key)
    badge = "" if change is None else f"<em class='badge'>{escape(_said(change))}</em>"
    changed = "" if change is None else escape(change) if isinstance(change, str) else f"{change:g}"
    thumb = (
        f"<svg class='thumb' viewBox='0 0 {image.width} {image.height}' aria-hidden='true'>"
        f"<use href='#why-photo' class='grey'/><use href='#why-{slot.number}-{number}'/></svg>"
    )
    kind = f"<small title='{KINDS[concept.kind]}'>{concept.kind}</small>" if concept.kind else ""
    return (
        f"<button type='button' class='concept' data-c='{number}' data-name='{escape(concept.name)}' "
        f"data-share='{concept.share:.0%}' data-change='{changed}' aria-pressed='false'>{thumb}<span class='about'>"
        f"<span class='head'><strong>{escape(concept.name)}</strong>{kind}{badge}"
        f"<span class='from'>{source}</span></span>"
        f"{_bar('heat', concept.share, f'{concept.share:.0%} of the heat')}{_bar('loss', concept.lost, _loss(concept))}"
        "</span></button>"
    )


def _loss(concept: Concept) -> str:
    """What the mask loses without a concept, in a few words."""
    if concept.lost is None:
        return ""
    return f"without it −{concept.lost:.0%}" if concept.lost >= 0.005 else "mask stays without"


def _bar(kind: str, share: float | None, said: str) -> str:
    """A share in [0, 1] as a bar with its words; two of them under each other have one scale."""
    if share is None:
        return "<span class='measure'></span>"
    return (
        f"<span class='measure {kind}'><span class='bar'><i style='width:{100 * min(share, 1):.1f}%'></i></span>"
        f"<span class='said'>{said}</span></span>"
    )


def _said(change: float | str) -> str:
    """A change in a word or two."""
    if isinstance(change, str):
        return f"→ {change}"
    return "off" if change == 0 else f"× {change:g}"


def _controls(why: Why, concepts: list[Key], swaps: dict[str, str]) -> str:
    if not concepts:
        return "<p class='hint'>There are no concepts to change in this answer.</p>"
    groups = {f"{kind}s": [name for name in swaps if swaps[name] == kind] for kind in KINDS}
    options = "".join(
        f"<optgroup label='{group}'>"
        + "".join(f"<option value='{escape(name)}'>{escape(name)}</option>" for name in names)
        + "</optgroup>"
        for group, names in groups.items()
        if names
    )
    swap = (
        f"<label class='swap'>or put <select class='other' aria-label='the concept in its place'>{options}</select> "
        "in its place</label><button type='button' data-do='swap'>Swap</button>"
        if swaps and why.additive
        else ""
    )
    undo = "" if why.changes else " disabled"
    numbers = {key: number for number, key in enumerate(concepts)}
    changes = "".join(_chip(why, key, numbers.get(key)) for key in why.changes)
    return (
        "<div class='do'><span>Change <strong class='chosen'></strong>: acts on all masks of this answer</span>"
        "<button type='button' data-do='off'>Switch off</button>"
        f"<button type='button' data-do='double'>Double</button>{swap}"
        f"<button type='button' class='undo' data-do='undo'{undo}>Undo all</button></div>"
        f"<p class='hint'>Choose another concept in 2. The words stay as they are; only what they fire is changed.</p>"
        f"<ul class='changes' aria-label='changes in force, on all masks'>{changes}</ul>"
    )


def _chip(why: Why, key: Key, number: int | None) -> str:
    """A change in force, with a button that undoes it alone."""
    said = escape(f"{why.names.get(key, key)} {_said(why.changes[key])}")
    return (
        f"<li>{said}<button type='button' data-do='drop' data-concept='{number}' title='undo this change' "
        f"aria-label='undo {said}'>×</button></li>"
    )


def _pair(why: Why, slot: Slot, image: Image.Image, title: str) -> str:
    """The mask before and after the changes, side by side."""
    caption = f": {title} of {len(why.slots)}" if slot.kept and len(why.slots) > 1 else f": {title}"
    before = _figure("before", _picture(image, _drawn(slot, image), "the mask before"), caption)
    after = why.after.get(slot.number)
    if after is None:
        picture, said = _blank("nothing changed yet"), ""
    else:
        picture = _picture(image, _drawn(after, image), "the mask after the changes")
        said = moved(slot, after, why.threshold)
    shown = _figure("after", picture, caption)
    return (
        f"<div class='pair' data-slot='{slot.number}' style='{_tint(slot)}'>{before}{shown}"
        f"<p class='moved' role='status'>{escape(said)}</p></div>"
    )


def _figure(name: str, body: str, caption: str) -> str:
    return f"<figure class='{name}'><figcaption>{name}{caption}</figcaption>{body}</figure>"


# -- the pictures ------------------------------------------------------------------------------------------------------


def _picture(image: Image.Image, layers: str, name: str, grey: bool = False, more: str = "") -> str:
    shade = " class='grey'" if grey else ""
    return (
        f"<div class='picture' {more}><svg viewBox='0 0 {image.width} {image.height}' role='img' "
        f"aria-label='{escape(name)}'><use href='#why-photo'{shade}/>{layers}</svg></div>"
    )


def _blank(hint: str) -> str:
    return f"<div class='picture blank'><span>{escape(hint)}</span></div>"


def _total(slot: Slot) -> np.ndarray:
    """The heatmap; of a slot that is not kept, brightened, so that one sees where it looked."""
    if slot.kept or not slot.concepts:
        return slot.heat
    heat = np.sum([concept.heat for concept in slot.concepts], axis=0)
    return np.clip(heat / max(float(heat.max()), 1e-9), 0, 1) ** 0.6


def _part(slot: Slot, concept: Concept, numbers: dict[Key, int], strongest: float, image: Image.Image) -> str:
    """The place of one concept, as bright as it is beside the slot's strongest; shown when it is pointed at."""
    number = numbers[concept.key]
    heat = np.clip(concept.heat / strongest, 0, 1) ** 0.6
    layer = _layer(heat, slot, image, kind="", more=f"id='why-{slot.number}-{number}'")
    return f"<g class='part' data-c='{number}'>{layer}</g>"


def _uses(slot: Slot, numbers: dict[Key, int]) -> str:
    return "".join(
        f"<g class='part' data-c='{numbers[concept.key]}'><use href='#why-{slot.number}-{numbers[concept.key]}'/></g>"
        for concept in slot.concepts
    )


def _layer(
    heat: np.ndarray,
    slot: Slot,
    image: Image.Image,
    kind: str,
    more: str = "",
) -> str:
    """A heat, float (h, w) in [0, 1], in the slot's colour over the image."""
    pixels = np.zeros((*heat.shape, 4), np.uint8)  # (h, w, 4) red, green, blue, opacity
    pixels[..., :3] = _colour(slot)
    pixels[..., 3] = (225 * np.clip(heat, 0, 1)).astype(np.uint8)
    name = f"class='{kind}' " if kind else ""
    return (
        f"<image {name}{more} width='{image.width}' height='{image.height}' "
        f"preserveAspectRatio='none' href='{_png(pixels)}'/>"
    )


def _drawn(slot: Slot, image: Image.Image) -> str:
    """A mask; faint where it is not kept."""
    return _mask(slot, image) if slot.kept else _mask(slot, image, fill=40, outline=110)


def _mask(slot: Slot, image: Image.Image, fill: int = 120, outline: int = 255) -> str:
    """A mask's inside and its outline, as opaque as said, up to 255."""
    if not slot.mask.any():
        return ""
    mask = Image.fromarray(slot.mask.astype(np.uint8) * 255).resize(_twice(image), Image.Resampling.BILINEAR)
    inside = np.asarray(mask) >= 128
    edge = max(2, round(max(inside.shape) / 110))
    bordered = Image.fromarray(np.pad(inside, edge).astype(np.uint8))
    core = np.asarray(bordered.filter(ImageFilter.MinFilter(2 * edge + 1)))[edge:-edge, edge:-edge] > 0
    pixels = np.zeros((*inside.shape, 4), np.uint8)
    pixels[..., :3] = _colour(slot)
    pixels[inside, 3] = fill
    pixels[inside & ~core, 3] = outline
    return (
        f"<image width='{image.width}' height='{image.height}' preserveAspectRatio='none' href='{_png(pixels)}' "
        f"class='drawn' data-mask='{slot.number}'/>"
    )


def _twice(image: Image.Image) -> tuple[int, int]:
    """The size at which outlines are drawn: finer than a small image's pixels."""
    scale = max(1, round(2 * 300 / max(image.size)))
    return image.width * scale, image.height * scale


def _spots(slot: Slot, numbers: dict[Key, int], strongest: float) -> list[list[int]]:
    """Rows of the concept that adds most at each place, -1 where none adds much."""
    if not slot.concepts:
        return []
    heats = [
        np.asarray(Image.fromarray(concept.heat.astype(np.float32)).resize((SPOTS, SPOTS), Image.Resampling.BOX))
        for concept in slot.concepts
    ]
    stacked = np.stack(heats)  # (concepts, SPOTS, SPOTS)
    names = np.array([numbers[concept.key] for concept in slot.concepts])
    return np.where(stacked.max(0) > 0.1 * strongest, names[stacked.argmax(0)], -1).tolist()


def _colour(slot: Slot) -> tuple[int, int, int]:
    return COLOURS[slot.number % len(COLOURS)]


def _tint(slot: Slot) -> str:
    red, green, blue = _colour(slot)
    return f"--slot:{red} {green} {blue}"


def _png(pixels: np.ndarray) -> str:
    return _data_uri(Image.fromarray(pixels), "png", optimize=True)


def _jpeg(image: Image.Image) -> str:
    return _data_uri(image, "jpeg", quality=90)


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
