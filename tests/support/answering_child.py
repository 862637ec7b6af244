"""Run by a `JsonProcess`: adds numbers to the first one, and prints what is none of its answers."""

from __future__ import annotations

from clover_vllm.launch.process import Parent


def serve(parent: Parent) -> None:
    commands = parent.commands()
    first = next(commands)["number"]
    parent.say({"ready": True})
    for command in commands:
        print(f"asked for {command['number']}", flush=True)
        parent.say({"sum": first + command["number"]})


if __name__ == "__main__":
    serve(Parent())
