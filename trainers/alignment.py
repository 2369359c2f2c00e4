"""The alignment term of the cold start: at the SAE's layer, words and the patches that they name get similar states.

An SAE of that layer can then share a feature between a word and what it looks like, which a language model's own
training does not ask for. All it needs is rows with `phrases` (`loaders.rows.PHRASES`): words, and masks of what they
name. It knows nothing about slots, concepts or labels of attributes.

    targets = AlignmentTargets(processor)(rows, batch)
    loss = alignment_loss(outputs.hidden_states[layer], targets)

Patches that no mask touches are taken as showing none of the words (padding and ground alike); a data set whose phrases
name only some of an image's things teaches a little that is wrong there.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segcompass.modeling_segcompass.patch_boxes import has_area

from .targets import patch_coverage

WordKind = Callable[[str], tuple[str, str] | None]
"""A word -> its kind and its meaning, or None for a word that names nothing."""

_WORD = re.compile(r"[^\W\d_]+|\d")


@dataclass(frozen=True)
class Alignment:
    """What a batch's words and patches show. M word tokens, N patches, V meanings."""

    words: Tensor
    """(M, 2) long, (sample, position in the sequence) of each word's last token."""
    meanings: Tensor
    """(M,) long, each word's meaning."""
    patches: Tensor
    """(N, 2) long, (sample, position in the sequence) of each clear patch: at least half of it is one thing, or it is
    touched by none."""
    shown: Tensor
    """(N, V) bool, whether a thing that the meaning is said of covers at least half of the patch."""
    kinds: Tensor
    """(V,) long, each meaning's kind."""

    def to(self, device: torch.device) -> "Alignment":
        """The same on another device."""
        return Alignment(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def any_word(word: str) -> tuple[str, str]:
    """Every word means itself, and all are of one kind."""
    return "", word.lower()


class AlignmentTargets:
    """Makes the alignment's targets of a batch.

    Args:
        processor: a SegCompassProcessor with a fast tokenizer.
        word_kind: what a word says. Patches tell words of one kind apart (red, green, blue) rather than from all
            others; `loaders.scene_questions.word_kind` knows the scenes' words, `any_word` takes them as they are.
        misnamed: meaning -> another one that its words are said to have. For a control only: it trains on wrong pairs.

    Example:
        >>> make = AlignmentTargets(processor)
        >>> alignment = make(rows, collator(rows))
        >>> alignment.shown.shape
        torch.Size([128, 11])
    """

    def __init__(
        self,
        processor: Any,
        word_kind: WordKind = any_word,
        misnamed: Mapping[str, str] | None = None,
    ):
        self.processor = processor
        self.word_kind = word_kind
        self.misnamed = misnamed or {}

    def __call__(self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> Alignment:
        """Make the targets.

        Args:
            rows: B rows with `phrases` and `reasoning`.
            batch: the processor's inputs of these rows with their responses.

        Returns:
            Words and patches, on the CPU.

        Raises:
            ValueError: a row without phrases, or a phrase that does not stand where it says.
        """
        images = [row.nonzero()[:, 0].tolist() for row in batch["input_ids"] == self.processor.image_token_id]
        responses = [row.nonzero()[:, 0].tolist() for row in batch["response_mask"]]
        words, patches, names = [], [], []  # names: of each word its own meaning, by which patches are told
        told: list[tuple[int, list[tuple[tuple[str, str], Tensor]]]] = []
        for sample, row in enumerate(rows):
            phrases = self._phrases(row)
            boxes = batch["patch_boxes"][sample, : len(images[sample])]
            things = {mask["counts"]: mask for phrase in phrases for mask in phrase["masks"]}
            cover = patch_coverage(list(things.values()), row["height"], row["width"], boxes)  # (things, patches)
            owned = dict(zip(things, cover >= 0.5, strict=True))  # (patches,) each
            clear = ((cover >= 0.5).any(0) | (cover.sum(0) == 0)) & has_area(boxes)
            said: list[tuple[tuple[str, str], Tensor]] = []
            for phrase, position, name in self._words(row, phrases, responses[sample]):
                words.append((sample, position))
                names.append(name)
                if phrase["masks"]:
                    said.append((name, torch.stack([owned[mask["counts"]] for mask in phrase["masks"]]).any(0)))
            kept = clear.nonzero()[:, 0].tolist()
            patches += [(sample, images[sample][patch]) for patch in kept]
            told.append((len(kept), [(name, owns[kept]) for name, owns in said]))
        meanings = {name: number for number, name in enumerate(sorted(set(names)))}
        shown, start = torch.zeros(len(patches), len(meanings), dtype=torch.bool), 0
        for count, said in told:
            for name, owns in said:
                shown[start : start + count, meanings[name]] |= owns
            start += count
        order = {kind: number for number, kind in enumerate(sorted({kind for kind, _ in meanings}))}
        given = [(kind, self.misnamed.get(name, name)) for kind, name in names]
        heard = [index for index, name in enumerate(given) if name in meanings]
        return Alignment(
            words=torch.tensor([words[index] for index in heard], dtype=torch.long).view(-1, 2),
            meanings=torch.tensor([meanings[given[index]] for index in heard], dtype=torch.long),
            patches=torch.tensor(patches, dtype=torch.long).view(-1, 2),
            shown=shown,
            kinds=torch.tensor([order[kind] for kind, _ in meanings], dtype=torch.long),
        )

    @staticmethod
    def _phrases(row):
        if row.get("phrases") is None:
            raise ValueError(
                f"row {row.get('sample_id')!r} has no phrases; the alignment term needs the column 'phrases' "
                "(loaders.rows.PHRASES), so fill it or set lambda_align to 0."
            )
        for phrase in row["phrases"]:
            if row["reasoning"][phrase["start"] :][: len(phrase["text"])] != phrase["text"]:
                raise ValueError(
                    f"row {row.get('sample_id')!r}: the phrase {phrase['text']!r} does not stand at character "
                    f"{phrase['start']} of its reasoning; correct its start."
                )
        return row["phrases"]

    def _words(self, row, phrases, positions):
        """(phrase, position of the word's last token, (kind, meaning)) of each word that says something."""
        response = self.processor.format_response(row["reasoning"])
        shift = response.index(row["reasoning"])
        spans = self.processor.tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end - shift for _, end in spans["offset_mapping"]]
        for phrase in phrases:
            for word in _WORD.finditer(phrase["text"]):
                name = self.word_kind(word.group())
                if name is not None:
                    last = phrase["start"] + word.end()
                    yield phrase, positions[next(i for i, end in enumerate(ends) if end >= last)], name


def alignment_loss(states: Tensor, alignment: Alignment, temperature: float = 0.1) -> Tensor:
    """The alignment term, in float32 whatever the autocast.

    With s the cosine of a word's and a patch's centred states over the temperature, half of
    - the mean over words of -log(sum of e^s over the patches that show its meaning / sum over all patches), and
    - the mean over kinds, and within one over the pairs of a patch and a meaning of that kind that it shows, of
      -log(sum of e^s over the meaning's words / sum over these and the kind's words that the patch does not show).
    Words are centred by their mean, patches by the mean of those that show a thing.

    Args:
        states: float (B, T, d), the residual stream at the SAE's layer.
        alignment: what `AlignmentTargets` made.
        temperature: above 0.

    Returns:
        A scalar, 0 and connected to the graph where no word has a patch.

    Example:
        >>> loss = alignment_loss(outputs.hidden_states[layer], alignment)
        >>> loss.backward()
    """
    alignment = alignment.to(states.device)
    with torch.autocast(states.device.type, enabled=False):
        words = states[alignment.words[:, 0], alignment.words[:, 1]].float()  # (M, d)
        patches = states[alignment.patches[:, 0], alignment.patches[:, 1]].float()  # (N, d)
        things = alignment.shown.any(1)
        same = alignment.shown.T[alignment.meanings]  # (M, N)
        if not same.any():
            return states.sum() * 0.0
        words = F.normalize(words - words.mean(0), dim=1)
        patches = F.normalize(patches - patches[things].mean(0), dim=1)
        similarity = words @ patches.T / temperature  # (M, N)
        found = same.any(1)
        from_words = (similarity.logsumexp(1) - _among(similarity, same, 1))[found].mean()
        from_patches = [_by_meaning(similarity, same, alignment, kind) for kind in alignment.kinds.unique()]
        return (from_words + torch.stack([loss for loss in from_patches if loss is not None]).mean()) / 2


def _among(similarity, chosen, dim):
    """log-sum-exp over the chosen entries."""
    return similarity.masked_fill(~chosen, -1e9).logsumexp(dim)


def _by_meaning(similarity, same, alignment, kind):
    """The second half of the term for one kind, or None where no patch shows a word of it."""
    losses = []
    for meaning in (alignment.kinds == kind).nonzero()[:, 0]:
        own = alignment.meanings == meaning  # (M,)
        showing = alignment.shown[:, meaning]  # (N,)
        if not own.any() or not showing.any():
            continue
        of_kind = alignment.kinds[alignment.meanings] == kind
        rivals = (of_kind[:, None] & ~same[:, showing]) | own[:, None]  # (M, n)
        scores = similarity[:, showing]
        losses.append(_among(scores, rivals, 0) - _among(scores, own[:, None].expand_as(scores), 0))
    return torch.cat(losses).mean() if losses else None
