"""``hf:DIR``: a folder of Hugging Face, its weights, its tokenizer or image processor, and its own loss.

Nothing of the folder is run and nothing is fetched, unless the recipe says so.
"""

from __future__ import annotations

from hessdiag.schemes.models.hf.model import build

__all__ = ["build"]
