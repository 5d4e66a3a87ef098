// Sphinx drops words of digits alone from what was asked for; conf.py keeps them in the
// index, and here they are asked for like other words. The halves of 0.6 would be found
// everywhere, so decimals stay out.
const parseQuery = Search._parseQuery;
const WORDS = [[/\bdatasets?\b/gi, "data set"], [/\bcustom\b/gi, "own"]]; // as it is said here
Search._parseQuery = (query) => {
  for (const [word, ours] of WORDS) query = query.replace(word, ours);
  const parsed = parseQuery(query);
  for (const digits of query.match(/(?<![\w.])\d{2,}(?![\w.])/g) ?? [])
    [parsed[1], parsed[3]].forEach((words) => words.add(digits));
  return parsed;
};

// Sphinx finds pages. Where a heading has all that was asked for, as it was typed, the
// result is put first and leads to that heading. The numbers are those of Sphinx's own
// scorer, which this one replaces.
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
    const [page, , anchor, , found] = result;
    const score = found + (/^(notebooks\/|FAQ)/.test(page) ? 6 : 0); // the text comes first
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
