"""What becomes of pictures that cannot be read."""

from collections.abc import Callable, Iterable, Mapping

from softvq.data.types import DataError

NAMED = 10  # in one line; of more, the rest is counted


class BadPictures:
    """The pictures that cannot be read: they end all, or are left out and told of in one line.

    skip: leave them out. note: takes the line.
    """

    def __init__(self, skip: bool, note: Callable[[str], None]):
        self.skip, self.note = skip, note
        self._names: dict[str, None] = {}  # in the order in which they were found
        self._told = 0
        self._others: list[str] = []

    def leave_out(self, names: Iterable[str]) -> None:
        """Take in pictures of shards that are no images of their own."""
        self._others += names

    def found(self, problems: Mapping[str, str]) -> None:
        """Take in what is wrong, by the picture's name. Raises DataError unless they are skipped.

        A picture that was found before counts once.
        """
        if problems and not self.skip:
            named = _listed([f"{name}: {problem}" for name, problem in problems.items()], "; ")
            them = "it" if len(problems) == 1 else "them"
            raise DataError(
                f"{named}; repair or remove {them}; softvq train leaves {them} out with "
                "--on-bad-image skip"
            )
        self._names |= dict.fromkeys(problems)

    def tell(self, aloud: bool = True) -> None:
        """Note, in a line for each kind, the pictures that were found since the last time."""
        new = list(self._names)[self._told :]
        self._told = len(self._names)
        if new and aloud:
            what = "1 picture" if len(new) == 1 else f"{len(new):,} pictures"
            self.note(f"{what} that cannot be read left out: {_listed(new, ', ')}")
        if self._others and aloud:
            self.note(
                f"{len(self._others):,} of the pictures in shards left out, with another dot in "
                f"their names, where a sample is KEY.png: {_listed(self._others, ', ')}"
            )
        self._others = []


def _listed(texts: list[str], separator: str) -> str:
    more = f" and {len(texts) - NAMED:,} more" if len(texts) > NAMED else ""
    return separator.join(texts[:NAMED]) + more
