"""What the command line says of a call that it refuses."""

import pytest

from softvq.cli import main


def refused(capsys, *arguments):
    """What stderr says of a bad call, without the "softvq COMMAND: error: " before it."""
    capsys.readouterr()  # what a run made for the test had to say
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n")
    prefix, line = printed.err.strip().split(" error: ")
    assert prefix == f"softvq {arguments[0]}:"
    return line
