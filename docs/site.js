// The page's own entry in the list at the left, and what a search has marked on the page,
// are brought to where one sees them. (The list is hidden on a phone.)
addEventListener("load", () => {
  const entry = document.querySelector(".sidebar-tree .current-page");
  const list = document.querySelector(".sidebar-scroll");
  if (entry && list && matchMedia("(min-width: 64em)").matches)
    list.scrollTop += entry.getBoundingClientRect().top - innerHeight / 2;
  setTimeout(() => { // Sphinx marks after the page is there
    const marked = location.hash ? null : document.querySelector("article .highlighted");
    marked?.scrollIntoView({ block: "center" });
  }, 200);
});
