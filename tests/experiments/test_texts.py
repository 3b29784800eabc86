"""What a run finds out about its texts: where a BOS belongs, how often a sequence was drawn, how long it may be."""

import json

import pytest

from dass.errors import DassError
from experiments import prune as app
from tests.experiments.test_prune import composed
from tests.models import random_tokens, tiny_model
from tests.tokenizers import tiny_tokenizer, words


@pytest.fixture
def setting(tmp_path):
    """Overrides that read one text of 199 tokens for both, and the folder for a model."""
    (tmp_path / "text.jsonl").write_text(json.dumps({"body": words(random_tokens(1, 199)[0])}))
    text = [f"{part}.path={tmp_path / 'text.jsonl'}" for part in ("calibration", "evaluation")]
    text += [f"{part}.field=body" for part in ("calibration", "evaluation")]
    sizes = ["calibration.n_sequences=4", "calibration.seq_len=20", "evaluation.seq_len=20"]
    place = ["model=local", f"model.path={tmp_path / 'model'}", f"results_dir={tmp_path / 'runs'}", "tracking=none"]
    return [*place, "calibration=text_file", "evaluation=text_file", *text, *sizes, "method=wanda", "device=cpu"]


def saved(folder, architecture, **changes):
    tiny_model(architecture, **changes).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")


@pytest.mark.parametrize(("architecture", "wanted"), [("gemma3", "per_sequence"), ("llama", "tokenizer")])
def test_what_a_model_wants_is_what_is_said_hashed_and_recorded(setting, tmp_path, capsys, architecture, wanted):
    saved(tmp_path, architecture)
    run_id = app.main(composed(*setting))
    assert capsys.readouterr().err.count("note: local is a Gemma") == (wanted == "per_sequence")
    record = json.loads((tmp_path / "runs" / f"{run_id}.json").read_text())
    assert [record["config"][part]["bos"] for part in ("calibration", "evaluation")] == [wanted, wanted]
    assert record["metrics"][0]["n"] == (10 if wanted == "per_sequence" else 9)  # windows of 19 or 20 words
    assert record["calibration"] == {"n_sequences": 4, "seq_len": 20, "repeated": 0}
    capsys.readouterr()
    assert app.main(composed(*setting, f"model.bos={wanted}")) == run_id
    said = capsys.readouterr()
    assert "already done" in said.out and "Gemma" not in said.err  # nothing was left open
    for other in ("none", "tokenizer", "per_sequence"):
        app.main(composed(*setting, f"evaluation.bos={other}", "dry_run=true"))
        assert capsys.readouterr().out.startswith(run_id) == (other == wanted)


def test_repeated_sequences_are_recorded(setting, tmp_path, capsys):
    saved(tmp_path, "llama")
    run_id = app.main(composed(*setting, "calibration.join=false", "calibration.seq_len=197"))
    record = json.loads((tmp_path / "runs" / f"{run_id}.json").read_text())
    assert record["calibration"] == {"n_sequences": 4, "seq_len": 197, "repeated": 3}
    said = capsys.readouterr().err
    assert "note: 3 of the 4 calibration sequences were drawn before" in said
    assert "note: The calibration tokens are sequences of 197 tokens; the model was made for 128" in said


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
def test_windows_beyond_a_table_of_positions_end_the_run(setting, tmp_path, part):
    saved(tmp_path, "gpt2", max_position_embeddings=32)
    with pytest.raises(DassError, match="are sequences of 33 tokens, and the model has 32 positions"):
        app.main(composed(*setting, f"{part}.seq_len=33", "calibration.n_sequences=2"))
