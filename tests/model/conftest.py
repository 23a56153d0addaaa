"""What tests of adapters have in common."""

from __future__ import annotations

import pytest

from tests.families.test_families import load
from tests.support.tiny_models import tiny


@pytest.fixture
def two(folder):
    """transformers' model of a family and ours of a folder that it was written to: the test's module has both as its
    fixture `folder`.
    """
    return tiny(folder[0], tie_word_embeddings=False), load(folder[1], None, kv_dtype="f32")
