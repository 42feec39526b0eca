"""Which class is this token in? Selectors, the bytes of tokens, and the labeller that joins them."""

from dwl_plugin.classes.labeller import (
    IGNORE_INDEX,
    ClassSurvey,
    Labeller,
    build_labeller,
    empty_class_problems,
    survey,
)
from dwl_plugin.classes.selectors import TIME_LIMIT_S, PatternTooSlowError
from dwl_plugin.classes.token_table import TokenTable

__all__ = [
    "IGNORE_INDEX",
    "TIME_LIMIT_S",
    "ClassSurvey",
    "Labeller",
    "PatternTooSlowError",
    "TokenTable",
    "build_labeller",
    "empty_class_problems",
    "survey",
]
