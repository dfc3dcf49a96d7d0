"""The embedded default: `lamp_mini` makes synthetic users as `population` says, and `oracle` what can be reached with them;
`personas` lists lexicons, `train` makes the committed model.

Importing this loads no torch; only `harness.tiny.train` does.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The committed chat model; loads with `AutoModelForCausalLM.from_pretrained`, offline."""
