"""Which class is this token in? Selectors, the bytes of tokens, and the labeller that joins them."""

from dwl_plugin.classes.build import build_labeller
from dwl_plugin.classes.labeller import Labeller
from dwl_plugin.classes.masks import PatternTooSlowError
from dwl_plugin.classes.survey import FOLLOWS, ClassSurvey, empty_class_problems, survey, trained_on
from dwl_plugin.classes.token_bytes import TokenTable

__all__ = [
    "FOLLOWS",
    "ClassSurvey",
    "Labeller",
    "PatternTooSlowError",
    "TokenTable",
    "build_labeller",
    "empty_class_problems",
    "survey",
    "trained_on",
]
