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
from effects import percent
from PIL import Image, ImageFilter
from whereabouts import CELLS
from why import KINDS, LONGEST, TOP_CONCEPTS, Concept, Key, Slot, Why, apart, confidence, needed

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
FAINT = 0.05
"""Words of which a mask reads less than this share are not marked."""
SPOTS = 16
"""The places that one can point at, in each direction."""
DIM = 0.25
"""Heat below which nothing would be seen."""
SURE = "How sure the model is that there is something to find; mostly from its words, so it says little of the mask."
"""What a confidence means."""
MARKS = re.compile(r"\s*(</?think>|<REF_POS>)")
"""What the response says to the program and not to its reader."""


def waiting_page(text: str = "", note: str = "", warned: str = "") -> str:
    """The page before and while an answer is written.

    Args:
        text: what was written so far.
        note: instead of it, such as how many wait.
        warned: what to know of the question.

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
    return f"<div class='why' data-answer=''{busy}>{_top(verdict, '', warned)}{shown}{lower}</div>"


def answer_page(
    why: Why,
    image: Image.Image,
    concepts: list[Key],
    swaps: dict[str, str],
    name: str,
    warned: str = "",
    board: bool = False,
    foretells: bool = False,
) -> str:
    """The page with an answer.

    Args:
        why: the account of it.
        image: PIL image, RGB.
        concepts: the concepts by the number that the page knows them by; those of `why` are among them.
        swaps: names that may be put in a concept's place, each with its kind, "look" or "place".
        name: of the answer, so that the page knows a new one.
        warned: what to know of the question.
        board: whether the heatmap has the small model's board at its edges.
        foretells: whether `page.js` may ask what changes would do.

    Returns:
        HTML.
    """
    shown = image.copy()
    shown.thumbnail((LONGEST, LONGEST))
    numbers = {key: number for number, key in enumerate(concepts)}
    titles = why.titles
    tabs = "".join(_tab(slot, titles[slot.number], why.threshold, bool(why.after)) for slot in why.now)
    defs = (
        f"<svg class='defs' aria-hidden='true'><defs><image id='why-photo' width='{shown.width}' "
        f"height='{shown.height}' href='{_jpeg(shown)}'/></defs></svg>"
    )
    sections = "".join(_section(why, slot, shown, numbers, board) for slot in why.now)
    if not why.slots:
        text = f"<p class='text'>{escape(MARKS.sub('', ''.join(why.words)))}</p>"
        nothing = _chain(text, "", _blank("no heatmap"), _picture(shown, "", "the image"), ("", "", "", ""))
        sections = f"<div class='slot'>{nothing}</div>"
    pairs = "".join(_pair(why, slot, shown, titles[slot.number]) for slot in why.slots)
    needs = "".join(
        f"<p class='note' data-slot='{slot.number}'>{escape(needed(slot, why.threshold))} "
        f"<span>{escape(apart(slot))}</span></p>"
        for slot in why.now
    )
    lower = _lower(f"{needs}{_controls(why, concepts, swaps, foretells)}", pairs)
    head = _top(why.verdict, tabs, warned)
    asks = " data-foretells" if foretells else ""
    return f"<div class='why' data-answer='{escape(name)}'{asks}>{head}<div>{sections}</div>{lower}{defs}</div>"


# -- the parts ---------------------------------------------------------------------------------------------------------


def _top(verdict: str, tabs: str, warned: str) -> str:
    warning = f"<span class='warned' role='alert'>{escape(warned)}</span>" if warned else ""
    return (
        f"<div class='top'><p class='verdict' role='status' id='verdict'><span>{escape(verdict)}</span>{warning}</p>"
        f"<div class='tabs' role='group' aria-label='Which mask to explain'>{tabs}</div></div>"
    )


def _tab(slot: Slot, name: str, threshold: float, after: bool) -> str:
    sure = f"confidence {confidence(slot.confidence)}"
    if not slot.kept and slot.confidence >= threshold:  # sure, and yet nothing is drawn
        sure = "no mask left" if after else "no mask"
    elif not slot.kept:
        sure += f", needs {threshold:.2f}"
    return (
        f"<button type='button' class='tab' data-slot='{slot.number}' style='{_tint(slot)}' title='{SURE}' "
        f"aria-pressed='false'><i class='dot'></i>{name}<small>{sure}</small></button>"
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


def _section(why: Why, slot: Slot, image: Image.Image, numbers: dict[Key, int], board: bool) -> str:
    strongest = max((float(concept.heat.max()) for concept in slot.concepts), default=0.0) or 1.0
    parts = "".join(_part(slot, concept, numbers, strongest, image) for concept in slot.concepts)
    rows = "".join(_row(why, slot, concept, numbers[concept.key], image) for concept in slot.concepts)
    rows += "<div class='concept blank'></div>" * (TOP_CONCEPTS - len(slot.concepts))
    total = _layer(_total(slot), slot, image, kind="total")
    edge = _edge(slot, image) + (_board(image) if board else "")
    spots = json.dumps(_spots(slot, numbers, strongest))
    heat = _picture(image, f"{parts}{total}{edge}", "heatmap", grey=True, more=f"data-spots='{spots}'") + _legend(slot)
    others = [other for other in why.kept if other.number != slot.number]
    drawn = "".join(_mask(other, image, fill=0) for other in others) + _drawn(slot, image)
    mask = _picture(image, drawn + _uses(slot, numbers), "mask", more=f"data-spots='{spots}'")
    place = "all together" if why.additive else "the heatmap; in this read-out the places do not add up to it"
    place += (
        "; white line: the mask's edge"
        if slot.kept
        else "; white line: what it would have drawn"
        if slot.mask.any()
        else ""
    )
    place += "; brightened, for the heat is low" if _dim(slot) else ""
    drawn_as = "drawn where it is hottest, along edges in the picture" if slot.kept else "nothing is drawn"
    drawn_as = "faint: what it would have drawn" if slot.mask.any() and not slot.kept else drawn_as
    when = "<b>after:</b> " if why.changes else ""
    others_share = f" (all others {percent(slot.rest)})" if slot.rest >= 0.005 else ""
    known = any(concept.off is not None for concept in slot.concepts)
    takes = " Second: what goes if it is off." if known else ""
    kinds = "Look: how a thing looks; place: where it is. " if any(concept.kind for concept in slot.concepts) else ""
    relations = "Relations (left of, larger) are settled where it decides; concepts read only the conclusion. "
    captions = (
        f"{relations if why.additive else ''}Stronger colour: the mask reads more of the word.",
        f"{when}{kinds}{'First bar' if known else 'Bar'}: its share of the {_sum(why)}{others_share}.{takes}",
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
    second, third = why.stages
    for number, word in enumerate(why.words):
        if second < third and number in (second, third):
            decides = number == second
            parts.append(f"</span><span class='stage{' decides' if decides else ''}'>")
            parts.append(f"<small>{'it decides' if decides else 'it concludes'}</small> ")
        share = slot.read.get(number, 0.0)
        if number not in linked and share < FAINT:
            parts.append(escape(MARKS.sub("", word)))
            continue
        space = " " if word[:1].isspace() else ""
        fired = " ".join(map(str, linked.get(number, [])))
        phrase = slot.phrases.get(number, "").strip()
        together = f" It is read with what is before it: “{phrase}”." if phrase not in ("", word.strip()) else ""
        told = (
            f"{share:.0%} of what this mask reads comes from this word."
            if why.additive
            else f"This mask reads the word {share:.0%} as strongly as its strongest one."
        )
        parts.append(
            f"{space}<button type='button' class='word' data-c='{fired}' style='--share:{share:.2f}' "
            f"title='{escape(told + together)}'>{escape(word.strip())}</button>"
        )
    return f"<p class='text'><span class='stage'>{''.join(parts)}</span></p>"


def _row(why: Why, slot: Slot, concept: Concept, number: int, image: Image.Image) -> str:
    named = sorted(concept.words, key=lambda word: -concept.words[word])
    strongest = next((_read_as(why, slot, word) for word in named if why.words[word].strip()), "")
    source = f"from “{escape(strongest)}”" if strongest else ""
    replaced = [escape(str(why.names.get(key, key))) for key, other in why.changes.items() if other == concept.key]
    source = f"in place of {', '.join(replaced)}" if replaced else source
    change = why.changes.get(concept.key)
    badge = "" if change is None else f"<em class='badge'>{escape(why.said(change))}</em>"
    changed = "" if change is None else escape(change) if isinstance(change, str) else f"{change:g}"
    thumb = (
        f"<svg class='thumb' viewBox='0 0 {image.width} {image.height}' aria-hidden='true'>"
        f"<use href='#why-photo' class='grey'/><use href='#why-{slot.number}-{number}'/></svg>"
    )
    kind = f"<small>{concept.kind}</small>" if concept.kind else ""
    name, about = escape(concept.name), escape(concept.about)
    return (
        f"<button type='button' class='concept' data-c='{number}' data-name='{name}' title='{name}: {about}.' "
        f"data-about='{about}.' data-share='{percent(concept.share)}' data-change='{changed}' aria-pressed='false'>"
        f"{thumb}<span class='about'>"
        f"<span class='head'><strong>{name}</strong>{kind}{badge}"
        f"<span class='from'>{source}</span></span>"
        f"{_bar('heat', concept.share, f'{percent(concept.share)} of the {_sum(why)}')}"
        f"{_bar('loss', concept.off and concept.off.size, concept.off and f'off: {concept.off.brief}')}"
        "</span></button>"
    )


def _sum(why: Why) -> str:
    """What a concept has a share of."""
    return "heat" if why.additive else "weights"


def _read_as(why: Why, slot: Slot, word: int) -> str:
    """A word with those that were read together with it, from the last comma on."""
    read = [part.strip() for part in re.split(r"[,.:;]", slot.phrases.get(word, ""))]
    return next((part for part in reversed(read) if part), why.words[word].strip())


def _bar(kind: str, share: float | None, told: str | None) -> str:
    """A share in [0, 1] as a bar with its words; two of them under each other have one scale."""
    if share is None or told is None:
        return "<span class='measure'></span>"
    return (
        f"<span class='measure {kind}'><span class='bar'><i style='width:{100 * min(share, 1):.1f}%'></i></span>"
        f"<span class='said'>{told}</span></span>"
    )


def _controls(why: Why, concepts: list[Key], swaps: dict[str, str], foretells: bool) -> str:
    if not concepts:
        return "<p class='hint'>There are no concepts to change in this answer.</p>"
    groups = {f"{kind}s": [name for name in swaps if swaps[name] == kind] for kind in KINDS}
    options = "".join(
        f"<optgroup label='{group}'>"
        + "".join(f"<option value='{escape(name)}'>{escape(why.names.get(name, name))}</option>" for name in names)
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
    foretold = "<div class='foretold' aria-label='what these would do to this mask'></div>" if foretells else ""
    numbers = {key: number for number, key in enumerate(concepts)}
    changes = "".join(_chip(why, key, numbers.get(key)) for key in why.changes)
    return (
        "<div class='do'><span>Change <strong class='chosen'></strong>: acts on all masks of this answer</span>"
        "<button type='button' data-do='off'>Switch off</button>"
        f"<button type='button' data-do='double'>Double</button>{swap}"
        f"<button type='button' class='undo' data-do='undo'{undo}>Undo all</button></div>"
        f"{foretold}<p class='hint'><span class='about-chosen'></span> Choose another in 2. The words stay as they "
        "are; only what they fire is changed.</p>"
        f"<ul class='changes' aria-label='changes in force, on all masks'>{changes}</ul>"
    )


def _chip(why: Why, key: Key, number: int | None) -> str:
    """A change in force, with a button that undoes it alone."""
    made = escape(f"{why.names.get(key, key)} {why.said(why.changes[key])}")
    return (
        f"<li>{made}<button type='button' data-do='drop' data-concept='{number}' title='undo this change' "
        f"aria-label='undo {made}'>×</button></li>"
    )


def _pair(why: Why, slot: Slot, image: Image.Image, title: str) -> str:
    """The mask before and after the changes, side by side."""
    count = sum(each.kept for each in why.slots)
    caption = f": {title} of {count}" if slot.kept and count > 1 else f": {title}"
    before = _figure("before", _picture(image, _drawn(slot, image), "the mask before"), caption)
    after = why.after.get(slot.number)
    if after is None:
        picture = _blank("nothing changed yet")
    else:
        picture = _picture(image, _drawn(after, image), "the mask after the changes")
    shown = _figure("after", picture, caption)
    return (
        f"<div class='pair' data-slot='{slot.number}' style='{_tint(slot)}'>{before}{shown}"
        f"<p class='moved' role='status'>{escape(why.moved(slot))}</p></div>"
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


def _dim(slot: Slot) -> bool:
    """Whether a heatmap is brightened, so that one sees where it looked."""
    return not slot.kept and bool(slot.concepts) and float(slot.heat.max(initial=0)) < DIM


def _total(slot: Slot) -> np.ndarray:
    """The heatmap, its square root for the eye; brightened where nothing is drawn and one would see nothing."""
    if not _dim(slot):
        return np.sqrt(slot.heat)
    heat = np.sum([concept.heat for concept in slot.concepts], axis=0)
    return np.clip(heat / max(float(heat.max()), 1e-9), 0, 1) ** 0.6


def _legend(slot: Slot) -> str:
    """The scale of the heatmap's colours, with its highest value marked."""
    highest = float(slot.heat.max(initial=0))
    if not _dim(slot):
        ends, mark = ("0", "1"), f"<b style='left:{100 * highest:.0f}%'></b>"
    else:
        ends, mark = ("least", "most"), ""
    return (
        f"<p class='legend'><span>{ends[0]}</span><i class='ramp'>{mark}</i><span>{ends[1]}</span>"
        f"<span class='most'>hottest {confidence(highest)}</span></p>"
    )


def _board(image: Image.Image) -> str:
    """The names of the board's columns and rows, along the edges of a picture."""
    cell = max(image.size) / CELLS
    size = 0.17 * cell
    marks = [
        (cell * (place + 0.5), size, letter) for place, letter in enumerate("ABCD") if cell * place < image.width
    ] + [(0.6 * size, cell * (place + 0.5), digit) for place, digit in enumerate("1234") if cell * place < image.height]
    return f"<g class='board' font-size='{size:.1f}' aria-hidden='true'>" + "".join(
        f"<text x='{x:.1f}' y='{y:.1f}'>{text}</text>" for x, y, text in marks
    ) + "</g>"  # fmt: skip


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


def _mask(slot: Slot, image: Image.Image, fill: int = 72, outline: int = 255) -> str:
    """A mask's inside and its outline, as opaque as said, up to 255."""
    return _outlined(slot, image, _colour(slot), fill, outline, f"class='drawn' data-mask='{slot.number}'")


def _edge(slot: Slot, image: Image.Image) -> str:
    """A mask's outline in white, seen on any heat."""
    return _outlined(slot, image, (255, 255, 255), 0, 230, "class='edge'")


def _outlined(
    slot: Slot, image: Image.Image, colour: tuple[int, int, int], fill: int, outline: int, marked: str
) -> str:
    if not slot.mask.any():
        return ""
    mask = Image.fromarray(slot.mask.astype(np.uint8) * 255).resize(_twice(image), Image.Resampling.BILINEAR)
    inside = np.asarray(mask) >= 128
    edge = max(2, round(max(inside.shape) / 110))
    bordered = Image.fromarray(np.pad(inside, edge).astype(np.uint8))
    core = np.asarray(bordered.filter(ImageFilter.MinFilter(2 * edge + 1)))[edge:-edge, edge:-edge] > 0
    pixels = np.zeros((*inside.shape, 4), np.uint8)
    pixels[..., :3] = colour
    pixels[inside, 3] = fill
    pixels[inside & ~core, 3] = outline
    return (
        f"<image width='{image.width}' height='{image.height}' preserveAspectRatio='none' href='{_png(pixels)}' "
        f"{marked}/>"
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
