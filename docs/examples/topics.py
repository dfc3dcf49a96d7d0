"""A task of your own in 20 lines: which topic a mail is about, chosen among topics, for the users of mails.jsonl.

harness check docs/examples/topics.py
harness run --method rag --task docs/examples/topics.py
"""

import json
from pathlib import Path

from harness.tasks.users import Users

TOPICS = {"parcel": "delivery", "charged": "payment", "log in": "account", "lamp": "product", "cancel": "account"}


class Topics(Users):
    """The topic of a mail."""

    name = "topics"
    answers = "choice"  # or text, or number
    measured = ("macro_f1", "accuracy")
    wording = "{% for item in history %}{{ item.text }}\n{% endfor %}{{ input }}\nTopic ({{ choices | join(', ') }}):"

    def read(self):
        for line in map(json.loads, Path("mails.jsonl").read_text(encoding="utf-8").splitlines()):
            topics = [topic for word, topic in TOPICS.items() if word in line["input"]]
            earlier = [mail["input"] for mail in line["history"]]
            yield line | {"target": topics[0] if topics else "other", "history": earlier}
