"""Exported programs, as torch.export.save writes them, and the graphs of networks: read without torch, as data."""

from app.files.exported.archive import is_exported_program, read_program, write_program
from app.files.exported.graphs import GRAPH, describe_graph, graph_text

__all__ = ["GRAPH", "describe_graph", "graph_text", "is_exported_program", "read_program", "write_program"]
