"""The adapter for lm-eval (EleutherAI's lm-evaluation-harness): importing this registers `pdllm`.

    python -m pdllm_jax.evaluation.lm_eval --model pdllm --model_args pretrained=llada-8b ...

is lm-eval's own command line with the model registered; docs/evaluation.md says what it does.
"""

try:
    import lm_eval  # noqa: F401
except ImportError as error:
    if error.name != "lm_eval":
        raise
    raise ImportError(
        "the adapter needs lm-eval: pip install 'pdllm-jax[lm-eval]'", name="lm_eval"
    ) from None

from pdllm_jax.evaluation.lm_eval.adapter import PrefillingLM

__all__ = ["PrefillingLM"]
