"""What examines a model and is never served with it: are the concepts that are shown the ones that are used?

    concept_dictionary     what each feature fires on, and a short name made from that
    dictionary_reader      reads a data set for the dictionary
    examination            reads rows and measures them, so that a killed run resumes
    detectors              which feature detects an attribute best, chosen and scored on different samples
    scene_attributes       what is true of the procedural scenes, as attributes for the detectors
    image_truth            what is true of an image, as the criteria ask it of any data set
    scene_truth            that of procedural scenes
    annotated_truth        that of rows with the annotated instances of their image
    concept_labels         which concepts detect which attributes, from what is true
    decoding               masks decoded again from kept states, with some concepts only
    faithfulness           one mask without, and with only, its heaviest concepts
    faithfulness_records   the same for every right mask of a data set
    criteria               six questions to a mask: does the white box mean what it shows?
    criteria_page          the criteria as a page
    concept_access         how a read-out uses its concepts, for the criteria
    criteria_records       the criteria over images, with labels from others
    figure_records         what the paper's figures are drawn from
    figures                the paper's Figures 4, 5, 8 and 9
    intervals              bootstrap intervals

The commands `segcompass dictionary`, `faithfulness`, `white-box` and `interpret` hold their options; nothing here reads
them.
"""

from .concept_dictionary import ConceptDictionary, DictionaryBuilder
from .detectors import best_detectors
from .faithfulness import slot_faithfulness
from .intervals import bootstrap

__all__ = [
    "ConceptDictionary",
    "DictionaryBuilder",
    "best_detectors",
    "bootstrap",
    "slot_faithfulness",
]
