def add_optimizer_arguments(parser): return parser
def check_optimizer_arguments(args): pass
