"""Makes every fault happen and prints the table: `python -m tests.faults`. It takes minutes."""

import os
import sys

import pytest


class Table:
    """Collects what the fixture `count` enters."""

    def __init__(self):
        self.rows: list[tuple[str, int, int]] = []
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.rows += [row for name, row in report.user_properties if name == "fault"]
        if report.outcome != "passed":
            self.failed.append(f"{report.outcome}: {report.nodeid}")


def main() -> int:
    table = Table()
    os.environ["ALL_FAULTS"] = "1"
    code = pytest.main(["-q", "-m", "slow or not slow", "-p", "no:warnings", __package__.replace(
        ".", "/"), *sys.argv[1:]], plugins=[table])  # fmt: skip
    print("\n| fault | tried | survived |\n|---|---|---|")
    for fault, tried, survived in table.rows:
        print(f"| {fault} | {tried} | {survived} |")
    print("\n".join(table.failed))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
