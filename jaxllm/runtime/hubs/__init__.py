"""Models and data sets on hubs.

names           what a name on a hub means, and fetching what it names
snapshot        what is asked of a hub, and what comes
hugging_face    hf://, through huggingface_hub
modelscope      modelscope://, through modelscope_hub
"""
