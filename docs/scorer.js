// Sphinx finds pages, and drops words of digits alone. Where a heading has all that was
// asked for, as it was typed, the result is put first and leads to that heading. The
// numbers are those of Sphinx's own scorer, which this one replaces.
var Scorer = {
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
  score: (result) => {
    const [page, , anchor, , score] = result;
    const asked = new URLSearchParams(location.search).get("q").trim().toLowerCase();
    if (anchor) return score;
    for (const [title, places] of Object.entries(Search._index.alltitles)) {
      if (!title.toLowerCase().includes(asked)) continue;
      for (const [number, id] of places) {
        if (Search._index.docnames[number] !== page || !id) continue;
        result[1] += ` > ${title}`;
        result[2] = `#${id}`;
        return score + 20;
      }
    }
    return score;
  },
};
