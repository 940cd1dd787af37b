"""rename.py ROOT [robustmail.module:old=new ...] [attr:old=new ...]   renames a module-level name in its module and every importer (package, recipes, tests);
attr: renames an attribute, field, method or keyword argument of that name EVERYWHERE, so only for distinctive names. Locals of the same name are left alone."""
import sys, pathlib
sys.path.insert(0, "layout")
from tool import *
root = pathlib.Path(sys.argv[1]).resolve()
table, attrs = {}, {}
for a in sys.argv[2:]:
    m, p = a.split(":"); o, n = p.split("=")
    if m == "attr": attrs[o] = n
    else: table[(m, o)] = n
apply_renames(root, table, attrs)
