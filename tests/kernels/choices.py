"""Every tile that the shipped tables can choose."""

from softvq.kernels import tiles

# (architecture, kernel, operands, largest D) -> tile
CHOICES = {
    (architecture, kernel, operands, 64 << position): tile
    for architecture, table in tiles._TABLES.items()
    for (kernel, operands), row in table.items()
    for position, tile in enumerate(row)
}
