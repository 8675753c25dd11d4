"""Pages and HTTP: who may ask, how a server runs, and the page on which people rank.

guard    middleware: host names, origins, the API key, the size of a body
server   a server from its socket to its end
pages    the files in static/, which need nothing from elsewhere
"""
