"""Move modules and top-level symbols, rename names; rewrites imports everywhere. Usage: tool.moves(root), tool.renames(root)."""
import ast, re, subprocess, pathlib, io, tokenize, sys
from collections import defaultdict

PKG = "robustmail"

def modname(root, p):
    rel = p.relative_to(root).with_suffix("")
    parts = list(rel.parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)

def pyfiles(root):
    out = []
    for top in (PKG, "recipes", "tests", "docs"):
        out += sorted((root / top).rglob("*.py"))
    return [p for p in out if "__pycache__" not in p.parts]

# ---------------------------------------------------------------- import rewriting
def rewrite_imports(src, own, modmap, symmap, allmods):
    """Return new source. modmap old->new module; symmap (oldmod, name)->newmod."""
    tree = ast.parse(src)
    lines = src.splitlines(keepends=True)
    edits = []  # (startline0, endline0excl, text)
    renamed = {}  # local module alias old -> new
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0 and node.module.split(".")[0] == PKG:
            groups = defaultdict(list)
            changed = False
            for a in node.names:
                full = f"{node.module}.{a.name}"
                if (node.module, a.name) in symmap:
                    tgt = symmap[(node.module, a.name)]
                    groups[tgt].append(a.name + (f" as {a.asname}" if a.asname else ""))
                    changed |= tgt != node.module
                elif full in allmods:
                    new = modmap.get(full, full)
                    parent, leaf = new.rpartition(".")[0], new.rpartition(".")[2]
                    groups[parent].append(leaf + (f" as {a.asname}" if a.asname else ""))
                    if not a.asname and leaf != a.name:
                        renamed[a.name] = leaf
                    changed |= new != full
                else:
                    new = modmap.get(node.module, node.module)
                    groups[new].append(a.name + (f" as {a.asname}" if a.asname else ""))
                    changed |= new != node.module
            if changed:
                indent = re.match(r"\s*", lines[node.lineno - 1])[0]
                if lines[node.lineno-1][:node.col_offset].strip():
                    raise SystemExit(f"{own}:{node.lineno}: import not at line start")
                # comment on the last line
                tail = lines[node.end_lineno - 1][node.end_col_offset:].strip()
                tail = f"  {tail}" if tail and 'fmt: skip' not in tail else ""
                text = "".join(f"{indent}from {m} import {', '.join(sorted(set(ns)))}{tail}\n" for m, ns in sorted(groups.items()) if m != own)
                edits.append((node.lineno - 1, node.end_lineno, text))
        elif isinstance(node, ast.Import):
            for a in node.names:
                if a.name in modmap:
                    ln = node.lineno - 1
                    edits.append((ln, node.end_lineno, "".join(lines[ln:node.end_lineno]).replace(a.name, modmap[a.name])))
    for s, e, t in sorted(edits, reverse=True):
        lines[s:e] = [t]
    src = "".join(lines)
    if renamed:
        src = rename_tokens(src, renamed)
    return src

def rename_dotted_strings(src, modmap, symmap):
    """dotted names in strings and prose: robustmail.values -> robustmail.fields, robustmail.x.symbol"""
    def sub(m):
        full = m[0]
        if full in set(modmap.values()) or any(full.startswith(v + ".") for v in modmap.values()): return full
        parts = full.split(".")
        for k in range(len(parts), 1, -1):
            mod = ".".join(parts[:k])
            if k < len(parts) and (mod, parts[k]) in symmap:
                return ".".join([symmap[(mod, parts[k])], *parts[k:]])
            if mod in modmap:
                return ".".join([modmap[mod], *parts[k:]])
        return full
    pat = re.compile(r"\brobustmail(?:\.[A-Za-z_]\w*)+")
    return "".join(l if re.match(r"\s*(from|import) ", l) else pat.sub(sub, l) for l in src.splitlines(keepends=True))

# ---------------------------------------------------------------- token renames
def rename_tokens(src, names, attrs=None, heads=None, kwargs=None):
    """names: bare NAME (not after '.', not keyword-argument); attrs: NAME after '.'; kwargs: `name=` in calls;
    heads: bare NAME followed by '.'."""
    attrs, heads, kwargs = attrs or {}, heads or {}, kwargs or {}
    toks = list(tokenize.generate_tokens(io.StringIO(src).readline))
    lines = src.splitlines(keepends=True)
    edits = []
    depth = []
    for i, t in enumerate(toks):
        if t.type == tokenize.OP:
            if t.string in "([{": depth.append((t.string, toks[i-1] if i else None))
            elif t.string in ")]}": depth.pop()
        if t.type != tokenize.NAME: continue
        prev = toks[i - 1].string if i else ""
        nxt = toks[i + 1].string if i + 1 < len(toks) else ""
        new = None
        if prev == ".":
            new = attrs.get(t.string)
        elif nxt == "=" and depth and depth[-1][0] == "(" and prev in "(,":
            new = kwargs.get(t.string)
        else:
            new = names.get(t.string)
            if new is None and nxt == ".": new = heads.get(t.string)
        if new: edits.append((t.start, t.end, new))
    for (l, c), (l2, c2), new in sorted(edits, reverse=True):
        lines[l-1] = lines[l-1][:c] + new + lines[l-1][c2:]
    return "".join(lines)

# ---------------------------------------------------------------- moves
def span(lines, node, nxt):
    """lines [start, end) of a top-level node with its comments above and its docstring below."""
    start = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])]) - 1
    while start and lines[start-1].startswith("#"): start -= 1
    end = node.end_lineno
    if nxt is not None and isinstance(nxt, ast.Expr) and isinstance(nxt.value, ast.Constant) and isinstance(nxt.value.value, str) and isinstance(node,(ast.Assign,ast.AnnAssign)):
        end = nxt.end_lineno
    return start, end

def defined(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)): return [node.name]
    if isinstance(node, ast.Assign):
        out = []
        for t in node.targets:
            out += [e.id for e in (t.elts if isinstance(t, ast.Tuple) else [t]) if isinstance(e, ast.Name)]
        return out
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name): return [node.target.id]
    return []

def import_bindings(tree):
    """bound name -> import source line"""
    out = {}
    todo = list(tree.body)
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.If): todo += node.body
        if isinstance(node, ast.ImportFrom):
            for a in node.names:
                out[a.asname or a.name] = f"from {node.module} import {a.name}" + (f" as {a.asname}" if a.asname else "")
        elif isinstance(node, ast.Import):
            for a in node.names:
                out[a.asname or a.name.split(".")[0]] = f"import {a.name}" + (f" as {a.asname}" if a.asname else "")
    return out

def used_names(text):
    names = set()
    for n in ast.walk(ast.parse(text)):
        if isinstance(n, ast.Name): names.add(n.id)
        elif isinstance(n, ast.Constant) and isinstance(n.value, str) and re.fullmatch(r"[\w\[\], .|]+", n.value):
            pass
    return names

def add_import(src, line):
    """after the last top-level import"""
    tree = ast.parse(src)
    last = 0
    for n in tree.body:
        if isinstance(n, (ast.Import, ast.ImportFrom)): last = n.end_lineno
    if not last:
        d = tree.body[0] if tree.body and isinstance(tree.body[0], ast.Expr) else None
        last = d.end_lineno if d else 0
        lines = src.splitlines(keepends=True)
        return "".join(lines[:last]) + "\n" + line + "\n" + "".join(lines[last:])
    lines = src.splitlines(keepends=True)
    return "".join(lines[:last]) + line + "\n" + "".join(lines[last:])

def set_all(src, remove=(), add=()):
    tree = ast.parse(src)
    for n in tree.body:
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name) and n.targets[0].id == "__all__":
            have = [x for x in ast.literal_eval(n.value) if x not in remove] + [a for a in add]
            lines = src.splitlines(keepends=True)
            end = n.end_lineno
            lines[n.lineno-1:end] = [f"__all__ = [{', '.join(repr(x) for x in dict.fromkeys(have))}]\n".replace("'", '"')]
            return "".join(lines)
    return src

def move_symbols(root, symbols, docs):
    """symbols: list of (oldmod(file path), newmod(file path), names). Edits source files; imports elsewhere by rewrite_imports."""
    for old, new, names in symbols:
        po, pn = root / old, root / new
        src = po.read_text(); tree = ast.parse(src); lines = src.splitlines(keepends=True)
        binds = import_bindings(tree)
        body = tree.body
        pieces, cut, got = [], [], []
        alldefs = {d for n in body for d in defined(n)}
        for i, n in enumerate(body):
            ds = defined(n)
            if ds and set(ds) & set(names):
                s, e = span(lines, n, body[i+1] if i+1 < len(body) else None)
                pieces.append("".join(lines[s:e])); cut.append((s, e)); got += ds
        missing = set(names) - set(got)
        if missing: print(f"!! {old}: not found: {missing}")
        moved_text = "\n\n".join(pieces)
        for s, e in reversed(cut): del lines[s:e]
        rest = "".join(lines)
        oldmod, newmod = modname(root, po), modname(root, pn)
        # destination
        if pn.exists(): dst = pn.read_text()
        else:
            pn.parent.mkdir(parents=True, exist_ok=True)
            dst = f'"""{docs[new]}"""\n\nfrom __future__ import annotations\n\n__all__: list[str] = []\n'
            dst = dst.replace("__all__: list[str] = []", "__all__ = []")
        dtree = ast.parse(dst); dbinds = import_bindings(dtree); ddefs = {d for n in dtree.body for d in defined(n)}
        dst = dst.rstrip("\n") + "\n\n\n" + moved_text
        for name in sorted(used_names(moved_text) - set(got)):
            if name in dbinds or name in ddefs: continue
            if name in binds and binds[name] != f"from {newmod} import {name}": dst = add_import(dst, binds[name])
            elif name in alldefs: dst = add_import(dst, f"from {oldmod} import {name}")
        dst = set_all(dst, add=[g for g in got if not g.startswith("_")])
        # the destination may have imported the moved name from the source
        dst = re.sub(rf"^from {re.escape(oldmod)} import .*$", lambda m: m[0], dst, flags=re.M)
        pn.write_text(dst)
        left = used_names(rest) & set(got)
        rest = set_all(rest, remove=got)
        for name in sorted(left): rest = add_import(rest, f"from {newmod} import {name}")
        po.write_text(rest)


# ---------------------------------------------------------------- renames
def fstring_sub(tok, names, attrs):
    def inner(m):
        e = m[0]
        e = re.sub(r"(?<![\w.'\"])([A-Za-z_]\w*)\b(?!\s*=[^=])", lambda k: names.get(k[1], k[1]), e)
        return re.sub(r"(?<=\.)([A-Za-z_]\w*)\b", lambda k: attrs.get(k[1], k[1]), e)
    return re.sub(r"(?<!\{)\{(?!\{)[^{}]*(?:\{[^{}]*\}[^{}]*)*\}", inner, tok)

def member_positions(tree):
    """(line, name) of methods and class fields; import spans"""
    members, imports = set(), {}
    for n in ast.walk(tree):
        if isinstance(n, ast.ClassDef):
            for m in n.body:
                if isinstance(m, (ast.FunctionDef, ast.AsyncFunctionDef)): members.add((m.lineno, m.name))
                elif isinstance(m, ast.AnnAssign) and isinstance(m.target, ast.Name): members.add((m.lineno, m.target.id))
                elif isinstance(m, ast.Assign):
                    for t in m.targets:
                        for e in (t.elts if isinstance(t, ast.Tuple) else [t]):
                            if isinstance(e, ast.Name): members.add((m.lineno, e.id))
        if isinstance(n, (ast.ImportFrom, ast.Import)):
            for l in range(n.lineno, n.end_lineno + 1): imports[l] = n
    return members, imports

def local_scopes(tree):
    """[(start, end, names bound inside by other means than imports)] of every function and lambda"""
    out = []
    for f in ast.walk(tree):
        if not isinstance(f, (ast.FunctionDef, ast.Lambda, ast.AsyncFunctionDef)): continue
        bound, glob = set(), set()
        a = f.args
        for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, *([a.vararg] if a.vararg else []), *([a.kwarg] if a.kwarg else [])]: bound.add(arg.arg)
        todo = list(f.body) if isinstance(f.body, list) else [f.body]
        while todo:
            n = todo.pop()
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)): bound.add(n.name); continue
            if isinstance(n, ast.Lambda): continue
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store): bound.add(n.id)
            if isinstance(n, ast.ExceptHandler) and n.name: bound.add(n.name)
            if isinstance(n, (ast.MatchAs, ast.MatchStar)) and n.name: bound.add(n.name)
            if isinstance(n, ast.Global): glob |= set(n.names)
            todo += list(ast.iter_child_nodes(n))
        # default values and annotations lie outside: begin at the body for names, but params are tokens in the head
        start = (f.lineno, f.col_offset)
        out.append((start, (f.end_lineno, f.end_col_offset), bound - glob, f))
    return out

def rename_all(src, names, attrs, kwargs, modattrs, lookup, scoped=()):
    """modattrs: {(alias, name): new}; lookup(module, name) -> new or None, for import statements"""
    tree0 = ast.parse(src)
    members, imports = member_positions(tree0)
    scopes = local_scopes(tree0)
    lines0 = src.splitlines()
    bytecol = lambda pos: len(lines0[pos[0]-1][:pos[1]].encode())
    def is_local(t):
        pos = (t.start[0], bytecol(t.start))
        return any(s <= pos < e and t.string in b for s, e, b, f in scopes)
    toks = list(tokenize.generate_tokens(io.StringIO(src).readline))
    lines = src.splitlines(keepends=True)
    edits, depth = [], []
    in_all = False
    for i, t in enumerate(toks):
        if t.type == tokenize.OP:
            if t.string in "([{":
                p = toks[i-1] if i else None
                call = t.string == "(" and p is not None and (p.type == tokenize.NAME and p.string not in ("def","return","in","and","or","not","if","else","yield","=","lambda","assert","for","is","from","import") or p.string in (")", "]"))
                isdef = call and i > 1 and toks[i-2].string == "def"
                depth.append("def" if isdef else "call" if call else t.string)
            elif t.string in ")]}": depth.pop()
        if t.type == tokenize.NEWLINE: in_all = False
        if t.type == tokenize.NAME and t.string == "__all__": in_all = True
        if t.type == tokenize.STRING:
            pre = re.match(r"[A-Za-z]*", t.string)[0].lower()
            new = t.string
            if "f" in pre:
                class K:  # a position with a name
                    start = t.start
                here = {}
                inside = {o: n2 for a, b, o, n2 in scoped if a <= (t.start[0], t.start[1]) < b}
                for o, n2 in {**names, **inside}.items():
                    k = K(); k.string = o
                    if not is_local(k): here[o] = n2
                new = fstring_sub(t.string, here, attrs)
            elif in_all: new = re.sub(r"\w+", lambda m: names.get(m[0], m[0]), t.string)
            if new != t.string: edits.append((t.start, t.end, new))
            continue
        if t.type != tokenize.NAME: continue
        prev = toks[i-1].string if i else ""; nxt = toks[i+1].string if i+1 < len(toks) else ""
        new = None
        if t.start[0] in imports:
            n = imports[t.start[0]]
            if isinstance(n, ast.ImportFrom) and n.module and prev not in (".", "from", "as"):
                if any(a.name == t.string for a in n.names): new = lookup(n.module, t.string)
        elif (t.start[0], t.string) in members and (prev == "def" or not depth and toks[i-1].type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL)):
            new = attrs.get(t.string)
        elif prev == ".":
            head = toks[i-2].string if i > 1 else ""
            new = modattrs.get((head, t.string)) or attrs.get(t.string)
        elif nxt == "=" and depth and depth[-1] == "call" and prev in ("(", ","):
            new = kwargs.get(t.string)
        else:
            new = names.get(t.string)
            if new and prev != "def" and is_local(t): new = None
            pos = (t.start[0], bytecol(t.start))
            for a, b, o, n2 in scoped:
                if o == t.string and a <= pos < b: new = n2
        if new: edits.append((t.start, t.end, new))
    for (l, c), (l2, c2), new in sorted(edits, reverse=True):
        lines[l-1:l2] = [lines[l-1][:c] + new + lines[l2-1][c2:]]
    return "".join(lines)

def apply_renames(root, table, attrs):
    """table: {(module, old): new}; attrs: {old: new} for attributes, fields, methods, keyword arguments."""
    table = dict(table)
    for p in (root / PKG).rglob("__init__.py"):
        own = modname(root, p)
        for node in ast.walk(ast.parse(p.read_text())):
            if isinstance(node, ast.ImportFrom):
                for a in node.names:
                    if (node.module, a.name) in table: table[(own, a.name)] = table[(node.module, a.name)]
    bymod = defaultdict(dict)
    for (m, o), n in table.items(): bymod[m][o] = n
    public = {o: n for (m, o), n in table.items()}
    init = (root / PKG / "__init__.py").read_text()
    exported = {}
    tree = ast.parse(init)
    for node in tree.body:
        if isinstance(node, ast.If):
            for x in node.body:
                if isinstance(x, ast.ImportFrom):
                    for a in x.names:
                        if (x.module, a.name) in table: exported[a.name] = table[(x.module, a.name)]
    for p in pyfiles(root):
        src = p.read_text(); own = modname(root, p); tree = ast.parse(src)
        names, modattrs = dict(bymod.get(own, {})), {}
        import_only = {}
        scoped = []
        infunc = {}
        for f in ast.walk(tree):
            if isinstance(f, ast.FunctionDef):
                for x in ast.walk(f):
                    if isinstance(x, ast.ImportFrom): infunc[id(x)] = f
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PKG:
                for a in node.names:
                    full = f"{node.module}.{a.name}"
                    new = table.get((node.module, a.name)) or (exported.get(a.name) if node.module == PKG else None)
                    if new and not a.asname and id(node) in infunc:
                        f = infunc[id(node)]
                        scoped.append(((f.lineno, f.col_offset), (f.end_lineno, f.end_col_offset), a.name, new))
                    elif new and not a.asname: names[a.name] = new
                    elif new: import_only[a.name] = new
                    if full in bymod:
                        for o, n in bymod[full].items(): modattrs[(a.asname or a.name, o)] = n
        if own == PKG:
            names = dict(exported)
            new = rename_all(src, names, attrs, attrs, modattrs, lambda m, n: table.get((m, n)), scoped)
            for o, n in exported.items(): new = new.replace(f'"{o}"', f'"{n}"')
        else:
            new = rename_all(src, names, attrs, attrs, modattrs, lambda m, n: table.get((m, n)), scoped)
            for o, n in import_only.items(): new = re.sub(rf"\b{o} as\b", f"{n} as", new)
            new = re.sub(r"(robustmail(?:\.\w+)+)\.(\w+)\b", lambda m: f"{m[1]}.{table.get((m[1], m[2]), m[2])}", new)
        # backticked mentions in prose
        new = re.sub(r"(?<!`)`(\w+)`(?!`)", lambda m: f"`{names.get(m[1]) or attrs.get(m[1], m[1])}`", new)
        if new != src: p.write_text(new)
