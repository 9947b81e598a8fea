"""Attribution graphs: which features of transcoders lead to what a model says next, and by how much."""

from qwen_lab.circuits.graph import Graph as Graph
from qwen_lab.circuits.intervening import Outcome as Outcome
from qwen_lab.circuits.intervening import intervene as intervene
from qwen_lab.circuits.replacement import replace as replace
from qwen_lab.circuits.room import Room as Room
from qwen_lab.circuits.rows import direct_effects as direct_effects
from qwen_lab.circuits.tracing import Options as Options
from qwen_lab.circuits.tracing import trace as trace
