"""What an adapter is: the engine, usable alone on any torch model. Importing it makes peft know its adapters."""

from smidgen.adapters import api, hosts
from smidgen.adapters.tuner import peft_bridge

peft_bridge.register()
hosts.follow(api.load)
