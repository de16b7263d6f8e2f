/** A figure as a PDF of one page: text stays text, pictures are stored without loss. As ISO 32000-1 says. */

import type { Figure, Item } from "./figure";

type Part = string | Uint8Array<ArrayBuffer>;

export async function writePdf(figure: Figure): Promise<Blob> {
  const images = figure.items.filter((item) => item.kind === "image");
  const content = await deflate(latin(drawing(figure)));
  const names = images.map((_, index) => `/I${index} ${index + 7} 0 R`).join(" ");
  const objects: Part[][] = [
    ["<< /Type /Catalog /Pages 2 0 R >>"],
    ["<< /Type /Pages /Kids [3 0 R] /Count 1 >>"],
    [
      `<< /Type /Page /Parent 2 0 R /MediaBox [0 0 ${figure.width} ${figure.height}] /Contents 4 0 R ` +
        `/Resources << /Font << /F0 5 0 R /F1 6 0 R >> /XObject << ${names} >> >> >>`,
    ],
    stream("", content),
    ["<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"],
    ["<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica-Bold /Encoding /WinAnsiEncoding >>"],
    ...(await Promise.all(images.map(({ canvas }) => imageObject(canvas)))),
  ];
  return new Blob(assemble(objects), { type: "application/pdf" });
}

/** The file: header, numbered objects, the table of where they begin, trailer. */
function assemble(objects: Part[][]): Part[] {
  const parts: Part[] = ["%PDF-1.4\n"];
  let place = parts[0]!.length;
  const add = (part: Part) => {
    parts.push(part);
    place += part.length;
  };
  const starts = objects.map((object, index) => {
    const start = place;
    add(`${index + 1} 0 obj\n`);
    object.forEach(add);
    add("\nendobj\n");
    return start;
  });
  const table = place;
  add(`xref\n0 ${objects.length + 1}\n0000000000 65535 f \n`);
  for (const start of starts) add(`${String(start).padStart(10, "0")} 00000 n \n`);
  add(`trailer\n<< /Size ${objects.length + 1} /Root 1 0 R >>\nstartxref\n${table}\n%%EOF\n`);
  return parts;
}

function stream(dictionary: string, bytes: Uint8Array<ArrayBuffer>): Part[] {
  return [`<< ${dictionary} /Filter /FlateDecode /Length ${bytes.length} >>\nstream\n`, bytes, "\nendstream"];
}

async function imageObject(canvas: HTMLCanvasElement): Promise<Part[]> {
  const { width, height } = canvas;
  const pixels = canvas.getContext("2d")!.getImageData(0, 0, width, height).data;
  const rgb = new Uint8Array(width * height * 3);
  for (let pixel = 0; pixel < width * height; pixel++) {
    // On white paper: a PDF image of this kind has no transparency.
    const alpha = pixels[pixel * 4 + 3]! / 255;
    for (let channel = 0; channel < 3; channel++) {
      rgb[pixel * 3 + channel] = Math.round(pixels[pixel * 4 + channel]! * alpha + 255 * (1 - alpha));
    }
  }
  const size = `/Width ${width} /Height ${height}`;
  return stream(`/Type /XObject /Subtype /Image ${size} /ColorSpace /DeviceRGB /BitsPerComponent 8`, await deflate(rgb));
}

/** The page's operators. PDF's y goes up from the bottom. */
function drawing({ height, items }: Figure): string {
  let image = 0;
  return items.map((item) => operators(item, height, () => image++)).join("\n");
}

function operators(item: Item, height: number, nextImage: () => number): string {
  if (item.kind === "text") {
    const move = { start: 0, middle: 0.5, end: 1 }[item.anchor] * textWidth(item);
    const place = `${(item.x - move).toFixed(2)} ${(height - item.y).toFixed(2)}`;
    return `BT /F${item.isBold ? 1 : 0} ${item.size} Tf 0 g ${place} Td (${escapeText(item.text)}) Tj ET`;
  }
  const bottom = (height - item.y - item.height).toFixed(2);
  if (item.kind === "rect") {
    const colour = item.colour.match(/\d+/g)!.map((channel) => (Number(channel) / 255).toFixed(4));
    return `${colour.join(" ")} rg ${item.x.toFixed(2)} ${bottom} ${item.width.toFixed(2)} ${item.height} re f`;
  }
  return `q ${item.width} 0 0 ${item.height.toFixed(2)} ${item.x} ${bottom} cm /I${nextImage()} Do Q`;
}

function textWidth(item: Extract<Item, { kind: "text" }>): number {
  const context = document.createElement("canvas").getContext("2d")!;
  context.font = `${item.isBold ? "bold " : ""}${item.size}px Helvetica, Arial, sans-serif`;
  return context.measureText(item.text).width;
}

function escapeText(text: string): string {
  return text.replace(/[\\()]/g, "\\$&");
}

/** Signs of WinAnsiEncoding beyond Latin-1 that our own texts use; of others (keys may have any), a question mark. */
const SIGNS: Record<string, number> = { "−": 45, "–": 150, "—": 151, "…": 133, "’": 146 };

function latin(text: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.from(text, (sign) => SIGNS[sign] ?? (sign.charCodeAt(0) < 256 ? sign.charCodeAt(0) : 63));
}

async function deflate(bytes: Uint8Array<ArrayBuffer>): Promise<Uint8Array<ArrayBuffer>> {
  const compressed = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(compressed).arrayBuffer());
}
