class ListFile:
    def __init__(self, source):
        self.source = source

    def __contains__(self, x):
        return x in self.source
