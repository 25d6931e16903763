"""Test that a run with document_mask needs an end-of-text id."""

import pytest
from helpers import make_data, tiny_run

from jaxgpt.config import UserError
from jaxgpt.runtime.run_dir import load_config
from jaxgpt.train import train


@pytest.mark.slow
def test_document_mask_needs_an_end_of_text_id(tmp_path):
    data_dir = make_data(tmp_path, "to be or not to be\n" * 30, name="verse", tokenizer="char")
    sizes = {"n_layer": 0, "max_iters": 2, "eval_iters": 1, "mesh": "data:1", "dataset": "verse"}
    config = tiny_run(tmp_path / "out", data_dir, **sizes, document_mask=True)
    with pytest.raises(UserError, match=r"document_mask=True: the tokenizer .* no end"):
        train(config)
    assert not (tmp_path / "out" / "config.json").exists()
    assert train(config.replace(eot_id=3)) == 0
    assert load_config(config.out_dir).eot_id == 3
    assert train(config.replace(max_iters=3, init_from="resume")) == 0
