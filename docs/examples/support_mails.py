"""Writes mails.jsonl: made-up support mails of 300 agents, each with habits of their own, in the form `--task users:` reads.

    python docs/examples/support_mails.py mails.jsonl

An agent has a greeting, a closing and a length, which show in the earlier replies and hold for the one that is asked for.
The first 60 agents are the train split, the other 240 are evaluated.
"""

import json
import random
import sys

AGENTS, TRAIN = 300, 60
GREETINGS = ("Hi {name},", "Dear {name},", "Hello {name}!", "Good morning {name},", "Hey {name},")
CLOSINGS = ("Best, {agent}", "Kind regards, {agent}", "Cheers, {agent}", "Yours sincerely, {agent}", "Thanks! {agent}")
TOPICS = {
    "My parcel has not come.": "we will send it again today (order {order}).",
    "I was charged twice.": "we have returned the second payment of order {order}.",
    "I cannot log in.": "we have reset your password (ticket {order}).",
    "The lamp is broken.": "a new lamp is on its way (order {order}).",
    "How do I cancel?": "your plan ends this month (ticket {order}).",
    "The app is slow.": "an update is out that mends this (ticket {order}).",
}
SORRY = ("", "Sorry about that: ", "I am very sorry for the trouble this made; ")
NAMES = ("Ann", "Bob", "Eve", "Kim", "Lee", "Max", "Sam", "Zoe")


def main(path: str) -> None:
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(AGENTS):
            agent, length = f"agent{number:03}", 1 + int(29 * draw.random() ** 2)
            habits = draw.choice(GREETINGS), draw.choice(SORRY), draw.choice(CLOSINGS)
            mails = [_mail(draw, agent, habits) for _ in range(length + 1)]
            *earlier, (asked, reply) = mails
            line = {
                "user": agent,
                "input": asked,
                "target": reply,
                "history": [{"input": mail, "output": answer} for mail, answer in earlier],
                "split": "train" if number < TRAIN else "dev",
            }
            file.write(json.dumps(line) + "\n")


def _mail(draw: random.Random, agent: str, habits: tuple[str, str, str]) -> tuple[str, str]:
    greeting, sorry, closing = habits
    name, (problem, answer) = draw.choice(NAMES), draw.choice(list(TOPICS.items()))
    order = draw.randrange(10_000, 100_000)
    sentence = sorry + answer.format(order=order)
    sentence = sentence[0].upper() + sentence[1:]
    return (
        f"{problem} My number is {order}. {name}",
        f"{greeting.format(name=name)} {sentence} {closing.format(agent=agent)}",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
