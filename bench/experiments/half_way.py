"""A plugin of the host: the backward pass ends at the lowest layer that has an adapter."""

from typing import Any

from axolotl.integrations.base import BasePlugin


class StopsHalfWay(BasePlugin):
    """Axolotl lets the embeddings ask for a gradient, as gradient checkpointing needs it; here it would only cost time."""

    def post_model_load(self, cfg: Any, model: Any) -> None:
        del cfg
        model.get_base_model().disable_input_require_grads()
