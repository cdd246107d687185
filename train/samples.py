"""Text that the model writes during training."""

from __future__ import annotations

import logging

import jax
import numpy as np

from btlm_jax.data.tokenizer import encode_prompt, load_tokenizer
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params
from btlm_jax.train.feed import TrainingData
from btlm_jax.train.preflight import SAMPLE_TOKENS
from btlm_jax.train.recipe import Recipe
from btlm_jax.utils.side_output import describe_error

logger = logging.getLogger(__name__)


class Samples:
    """Logs text that the model generates after the prompt of the recipe.

    A sample that fails ends the samples, not the run. Every process calls it after the same steps.

    Args:
      recipe: the recipe; without `run.sample_every` nothing is read.
      model: the model.
      data: the data, whose tokenizer is read.
    """

    def __init__(self, recipe: Recipe, model: BTLM, data: TrainingData) -> None:
        self._model, self._given_up = model, False
        if recipe.run.sample_every:
            self._tokenizer = load_tokenizer(data.sources[0].tokens.directory)
            self._ids = np.array([encode_prompt(self._tokenizer, recipe.run.prompt)])

    def __call__(self, params: Params, step: int) -> None:
        """Logs a sample of the weights after a step."""
        from btlm_jax.generation.generate import generate

        if self._given_up:
            return
        try:
            with jax.transfer_guard("allow"):
                out = generate(
                    self._model,
                    params,
                    self._ids,
                    max_new_tokens=SAMPLE_TOKENS,
                    do_sample=True,
                    seed=step,
                )
            text = self._tokenizer.decode(np.asarray(out)[0].tolist())
        except Exception as e:  # all processes run the same program, and fail alike
            self._given_up = True
            logger.warning(
                "step %d: no sample (%s); training continues without it", step, describe_error(e)
            )
        else:
            if jax.process_index() == 0:
                logger.info("step %d: %s", step, text)
